-- Prepended to every transition, after the constants that transitions/__init__.py writes:
-- RQ (key prefix), LEASE_S, LATE_QUEUED, LATE_STARTED, CANCELED, WORKER_LOST (how a job ends that no worker ended).
-- Each transition writes all that RQ's own code would write, so that RQ's tools read our jobs; and it is one script,
-- so that there is no moment with a job in no list. Keys are built here: one primary, not Redis Cluster.

local PRIORITIES = {'high', 'normal', 'low'}
local STARTED_MARGIN_S = 86400  -- RQ's tools take a started job for abandoned this long after its deadline: ours are first
local MAX_EVENTS = 256
local SUSPECTS_S = 8 * 86400
local DEADLINES = 'darkroom:deadlines'  -- id of every job not yet ended, scored by its deadline
local LEASES = 'darkroom:leases'  -- every worker that may hold jobs, scored by the end of its lease
local PAUSED = 'darkroom:paused'  -- models that no worker may claim for
local DRAINING = 'darkroom:draining'  -- models that nothing new is accepted for
local WORKERS = 'darkroom:workers'  -- JSON of [model, worker], scored by when it was last heard of

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
local function held_key(worker) return 'darkroom:held:' .. worker end  -- 'id:execution' of all that it holds
local function suspects_key(group) return 'darkroom:suspects:' .. group end  -- ids that run with nothing beside them
local function watch_key(id) return 'darkroom:watch:' .. id end  -- exists while somebody wants previews
local function preview_key(id) return 'darkroom:preview:' .. id end
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

-- Starts a life of a job at the end of its queue. fields: all of RQ's job hash, as fields and values.
local function enqueue(id, model, priority, deadline, fields)
  local queue = queue_of(model, priority)
  redis.call('HSET', job_key(id), unpack(fields))
  redis.call('HSET', job_key(id), 'status', 'queued', 'origin', queue, 'enqueued_at', iso_now())
  redis.call('SADD', RQ .. 'queues', list_key(queue))
  redis.call('RPUSH', list_key(queue), id)
  redis.call('ZADD', DEADLINES, deadline, id)
  event(id, 'queued')
  redis.call('PUBLISH', 'darkroom:submitted', model)
end

local function forget_executions(id, queue, worker)
  local executions = RQ .. 'executions:' .. id
  for _, execution in ipairs(redis.call('ZRANGE', executions, 0, -1)) do
    local pair = id .. ':' .. execution
    redis.call('DEL', RQ .. 'execution:' .. pair)
    redis.call('ZREM', RQ .. 'wip:' .. queue, pair)
    if worker then
      redis.call('SREM', RQ .. 'worker:' .. worker .. ':executions', pair)
      redis.call('SREM', held_key(worker), pair)
    end
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

local function leave_group(id)
  local group = redis.call('HGET', job_key(id), 'group')
  if group then redis.call('SREM', suspects_key(group), id) end
end

-- Lets a job run only with others of its group beside it: it may be what killed its worker.
local function set_apart(id, group)
  leave_group(id)
  redis.call('HSET', job_key(id), 'group', group)
  redis.call('SADD', suspects_key(group), id)
  redis.call('EXPIRE', suspects_key(group), SUSPECTS_S)
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
  leave_group(id)
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

-- Why a queue takes no more jobs: 'draining' or 'full'; nil if it does. Jobs past their deadline make room first.
local function refusal(model, priority, bound)
  end_late(100)
  if redis.call('SISMEMBER', DRAINING, model) == 1 then return 'draining' end
  if redis.call('LLEN', list_key(queue_of(model, priority))) >= bound then return 'full' end
end

-- Takes a started job from whoever holds it: to the front of its queue as if it had never started, or to its end if it
-- was asked to stop or is late. group: of suspects, for a job that may be what killed its worker.
local function put_back(id, group)
  local key, meta = job_key(id), meta_of(id)
  local f = redis.call('HMGET', key, 'origin', 'worker_name', 'cancel_requested')
  if f[3] then return end_job(id, 'canceled', CANCELED) end
  if end_if_late(id, 'started', meta) then return end
  forget_executions(id, f[1], f[2])
  redis.call('HSET', key, 'status', 'queued')
  redis.call('HDEL', key, 'worker_name', 'execution', 'started_at', 'step', 'steps')
  if group then set_apart(id, group) end
  redis.call('LPUSH', list_key(f[1]), id)
  event(id, 'queued')
  redis.call('PUBLISH', 'darkroom:submitted', meta.model)
end

-- The ids of these 'id:execution' that still run under that execution, last come first: in the order for `put_back`.
local function still_held(pairs_)
  local found = {}
  for _, pair in ipairs(pairs_) do
    local id, execution = string.match(pair, '^(.*):([^:]*)$')
    local f = redis.call('HMGET', job_key(id), 'status', 'execution', 'enqueued_at')
    if f[1] == 'started' and f[2] == execution then found[#found + 1] = {id = id, at = f[3] or ''} end
  end
  table.sort(found, function(a, b) return a.at > b.at or (a.at == b.at and a.id > b.id) end)
  local ids = {}
  for n, job in ipairs(found) do ids[n] = job.id end
  return ids
end

local function forget_worker(worker)
  redis.call('ZREM', LEASES, worker)
  redis.call('DEL', held_key(worker))
  for _, member in ipairs(redis.call('ZRANGE', WORKERS, 0, -1)) do
    if cjson.decode(member)[2] == worker then redis.call('ZREM', WORKERS, member) end
  end
end

-- A worker that is gone gives back all that it held, in two halves that run apart from each other and from all else, so
-- that a job that kills its worker is found: it ends up alone. A job that was alone when its worker's process died `limit`
-- times fails; limit nil: nobody saw the process die, so nothing is counted. Returns how many jobs it held.
local function bury(worker, limit)
  local ids = still_held(redis.call('SMEMBERS', held_key(worker)))
  forget_worker(worker)
  if #ids == 1 and limit and redis.call('HINCRBY', job_key(ids[1]), 'deaths', 1) >= limit then
    end_job(ids[1], 'failed', WORKER_LOST)
    return 1
  end
  for n, id in ipairs(ids) do put_back(id, worker .. (n <= #ids / 2 and '/b' or '/a')) end
  return #ids
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
