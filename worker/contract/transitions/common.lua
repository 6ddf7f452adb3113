-- Prepended to every transition, after the constants that transitions/__init__.py writes:
-- RQ (key prefix), LATE_QUEUED, LATE_STARTED, CANCELED (how a job ends that no worker ended).
-- Each transition writes all that RQ's own code would write, so that RQ's tools read our jobs; and it is one script,
-- so that there is no moment with a job in no list. Keys are built here: one primary, not Redis Cluster.

local PRIORITIES = {'high', 'normal', 'low'}
local STARTED_MARGIN_S = 86400  -- RQ's tools take a started job for abandoned this long after its deadline: ours are first
local MAX_EVENTS = 256
local DEADLINES = 'darkroom:deadlines'  -- id of every job not yet ended, scored by its deadline

local clock = redis.call('TIME')
local SECONDS, MICROS = tonumber(clock[1]), tonumber(clock[2])
local NOW = SECONDS + MICROS / 1e6

-- Numbers given to Redis need a format: Lua's own keeps 14 digits, a time in microseconds has 16.
local function decimal(t) return string.format('%.6f', t) end

-- NOW as RQ writes times; Redis has no os.date, so the Gregorian date is computed (days from 1 March of year 0).
local function iso_now()
  local floor = math.floor
  local day, second = floor(SECONDS / 86400), SECONDS % 86400
  local shifted = day + 719468
  local era = floor(shifted / 146097)
  local doe = shifted - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
  local mp = floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, doy - floor((153 * mp + 2) / 5) + 1,
    floor(second / 3600), floor(second % 3600 / 60), second % 60, MICROS)
end

local function job_key(id) return RQ .. 'job:' .. id end
local function list_key(queue) return RQ .. 'queue:' .. queue end
local function events_key(id) return 'darkroom:events:' .. id end
local function queue_of(model, priority) return 'darkroom.' .. model .. '.' .. priority end

-- The meta that submit wrote (schema, model, priority, deadline), or nil for a job that is not ours.
local function meta_of(id)
  local text = redis.call('HGET', job_key(id), 'meta')
  local ok, meta = pcall(cjson.decode, text or '')
  if ok and type(meta) == 'table' and meta.schema and meta.deadline then return meta end
end

local function event(id, name, data)
  redis.call('XADD', events_key(id), 'MAXLEN', '~', MAX_EVENTS, '*', 'event', name, 'data', data or '{}')
end

-- How many jobs of the same model go first; nil if it does not wait.
local function position(id, meta)
  local ahead = 0
  for _, priority in ipairs(PRIORITIES) do
    local list = list_key(queue_of(meta.model, priority))
    if priority == meta.priority then
      local at = redis.call('LPOS', list, id)
      return at and ahead + at or nil
    end
    ahead = ahead + redis.call('LLEN', list)
  end
end

local function forget_executions(id, queue, worker)
  local executions = RQ .. 'executions:' .. id
  for _, execution in ipairs(redis.call('ZRANGE', executions, 0, -1)) do
    local pair = id .. ':' .. execution
    redis.call('DEL', RQ .. 'execution:' .. pair)
    redis.call('ZREM', RQ .. 'wip:' .. queue, pair)
    if worker then redis.call('SREM', RQ .. 'worker:' .. worker .. ':executions', pair) end
  end
  redis.call('DEL', executions)
end

-- The stream of RQ's results: type 1 is a success, 2 a failure; RQ writes none for a canceled job.
local function write_result(id, status, ending, worker, execution, started_at)
  if status == 'canceled' then return end
  local finished = status == 'finished'
  local row = {'type', finished and 1 or 2, 'worker_name', worker or '',
    finished and 'return_value' or 'exc_string', ending.encoded}
  if execution then
    for _, value in ipairs({'execution_id', execution, 'execution_started_at', started_at,
        'execution_ended_at', decimal(NOW)}) do row[#row + 1] = value end
  end
  redis.call('XADD', RQ .. 'results:' .. id, 'MAXLEN', '~', 10, '*', unpack(row))
end

local function register(id, status, queue, lifetime)
  local registry = RQ .. status .. ':' .. queue
  local canceled = status == 'canceled'  -- scored by RQ with the time itself, the others with their end of life
  redis.call('ZADD', registry, canceled and SECONDS or SECONDS + lifetime, id)
  redis.call('ZREMRANGEBYSCORE', registry, '-inf', canceled and SECONDS - lifetime or SECONDS)
end

local function set_lifetime(id, lifetime)
  for _, key in ipairs({job_key(id), RQ .. 'results:' .. id, events_key(id)}) do
    redis.call('EXPIRE', key, lifetime)
  end
end

-- Ends a queued or started job. status: RQ's finished | failed | canceled.
-- ending: outcome (JSON of our Result), encoded (the same as RQ keeps it: base64 of the return value or of the error).
local function end_job(id, status, ending)
  local f = redis.call('HMGET', job_key(id), 'status', 'origin', 'worker_name', 'execution', 'result_ttl')
  local was, queue, worker, execution, lifetime = f[1], f[2], f[3], f[4], tonumber(f[5])
  if was ~= 'started' then worker, execution = false, false end
  local started_at = execution and redis.call('HGET', RQ .. 'execution:' .. id .. ':' .. execution, 'created_at')
  redis.call('LREM', list_key(queue), 1, id)
  forget_executions(id, queue, worker)
  redis.call('HSET', job_key(id), 'status', status, 'ended_at', iso_now(), 'outcome', ending.outcome)
  if was == 'started' then redis.call('HSET', job_key(id), 'last_heartbeat', iso_now()) end
  write_result(id, status, ending, worker, execution, started_at or decimal(NOW))
  register(id, status, queue, lifetime)
  redis.call('ZREM', DEADLINES, id)
  event(id, status == 'finished' and 'succeeded' or status, ending.outcome)
  set_lifetime(id, lifetime)
  redis.call('PUBLISH', 'darkroom:ended', id)
end

local function ask_to_stop(id)
  redis.call('PUBLISH', 'darkroom:stop:' .. (redis.call('HGET', job_key(id), 'worker_name') or ''), id)
end

-- Ends the job as failed if it is past its deadline; true if it did.
local function end_if_late(id, status, meta)
  if tonumber(meta.deadline) > NOW then return false end
  end_job(id, 'failed', status == 'queued' and LATE_QUEUED or LATE_STARTED)
  if status == 'started' then ask_to_stop(id) end
  return true
end

-- Ends up to `most` jobs past their deadline, whoever's they are; returns how many. Nothing waits for a worker to exist.
local function end_late(most)
  local ended = 0
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', decimal(NOW), 'LIMIT', 0, most)) do
    local f = redis.call('HMGET', job_key(id), 'status', 'result_ttl')
    local meta = meta_of(id)
    if meta and (f[1] == 'queued' or f[1] == 'started') then
      if end_if_late(id, f[1], meta) then ended = ended + 1 end
    elseif f[2] then set_lifetime(id, tonumber(f[2])) end  -- ended by a tool of RQ's, which keeps no lifetimes
    redis.call('ZREM', DEADLINES, id)
  end
  return ended
end

-- What Redis knows of a job, for its view: {position or -1, field, value, ...}; nil if there is no such job.
local function record(id)
  local meta = meta_of(id)
  if not meta then return nil end
  local status = redis.call('HGET', job_key(id), 'status')
  if status == 'queued' or status == 'started' then end_if_late(id, status, meta) end
  local reply = redis.call('HGETALL', job_key(id))
  table.insert(reply, 1, position(id, meta) or -1)
  return reply
end
