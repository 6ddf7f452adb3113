-- The lives of a job: it comes in, is put back, ends, and is forgotten.

-- Starts a life of a job at the end of its queue. fields: all of RQ's job hash, as fields and values.
local function enqueue(id, model, priority, fields)
  local queue = queue_of(model, priority)
  redis.call('HSET', job_key(id), unpack(fields))
  redis.call('HSET', job_key(id), 'status', 'queued', 'origin', queue, 'enqueued_at', iso_now())
  redis.call('SADD', RQ .. 'queues', list_key(queue))
  redis.call('RPUSH', list_key(queue), id)
  redis.call('ZREM', PICTURES, id)
  open_books(id, meta_of(id), queue)
  move(id, 'line')
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
  redis.call('ZADD', RECORDS, SECONDS, queue .. ' ' .. id)
end

local function unregister(id, queue)
  for _, status in ipairs({'finished', 'failed', 'canceled'}) do
    redis.call('ZREM', RQ .. status .. ':' .. queue, id)
  end
  redis.call('ZREM', RECORDS, queue .. ' ' .. id)
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

-- Counts how jobs of a model end and, of those that fail, why.
local function note_end(model, status, outcome)
  local failure = status == 'failed' and cjson.decode(outcome).failure
  local code = type(failure) == 'table' and failure.code or ''
  redis.call('HINCRBY', ENDED, cjson.encode({model, status == 'finished' and 'succeeded' or status, code}), 1)
end

-- Ends a queued or started job. status: RQ's finished | failed | canceled.
-- ending: outcome (JSON of our Result), encoded (the same as RQ keeps it: base64 of the return value or of the error), and
-- from a worker: expires_at (of the pictures), gpu_ms. Of a job that others ended while it ran, its worker may tell gpu_ms yet.
local function end_job(id, status, ending)
  local f = redis.call('HMGET', job_key(id), 'status', 'origin', 'worker_name', 'execution', 'result_ttl')
  local was, queue, worker, execution, lifetime = f[1], f[2], f[3], f[4], tonumber(f[5])
  if was ~= 'started' then worker, execution = false, false end
  local started_at = execution and redis.call('HGET', RQ .. 'execution:' .. id .. ':' .. execution, 'created_at')
  if was ~= 'started' then redis.call('LREM', list_key(queue), 1, id) end
  forget_executions(id, queue, worker)
  redis.call('HSET', job_key(id), 'status', status, 'ended_at', iso_now(), 'outcome', ending.outcome)
  if was == 'started' then redis.call('HSET', job_key(id), 'last_heartbeat', iso_now()) end
  write_result(id, status, ending, worker, execution, started_at or decimal(NOW))
  register(id, status, queue, lifetime)
  local expires_at = status == 'finished' and ending.expires_at or was == 'started' and decimal(NOW + LEFTOVERS_S)
  if expires_at then redis.call('ZADD', PICTURES, expires_at, id) end
  close_books(id)
  note_usage(meta_of(id), status, ending.gpu_ms)
  if execution and not ending.gpu_ms then expect_gpu_ms(id, execution, meta_of(id)) end
  note_end(meta_of(id).model, status, ending.outcome)
  leave_group(id)
  event(id, status == 'finished' and 'succeeded' or status, ending.outcome)
  set_lifetime(id, lifetime)
end

local function ask_to_stop(id)
  redis.call('PUBLISH', 'darkroom:stop:' .. (redis.call('HGET', job_key(id), 'worker_name') or ''), id)
end

-- Ends the job as failed if it is past its deadline; true if it did. gpu_ms: if its worker told.
local function end_if_late(id, status, meta, gpu_ms)
  if tonumber(meta.deadline) > NOW then return false end
  local ending = status == 'queued' and LATE_QUEUED or LATE_STARTED
  end_job(id, 'failed', {outcome = ending.outcome, encoded = ending.encoded, gpu_ms = gpu_ms})
  if status == 'started' then ask_to_stop(id) end
  return true
end

-- Ends up to `most` jobs past their deadline, whoever's they are; returns how many. Nothing waits for a worker to exist.
local function end_late(most)
  local ended = 0
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', decimal(NOW), 'LIMIT', 0, most)) do
    local status, meta = redis.call('HGET', job_key(id), 'status'), meta_of(id)
    redis.call('ZREM', DEADLINES, id)
    if not meta or (status ~= 'queued' and status ~= 'started') then
      cross_out(id)
    elseif end_if_late(id, status, meta) then
      ended = ended + 1
    else  -- not yet, by less than a microsecond, or in another life
      redis.call('ZADD', DEADLINES, decimal(meta.deadline + 1e-6), id)
    end
  end
  return ended
end

-- Whether a queue takes no more jobs of an owner. Beyond its bound it takes those of owners that have less than their share of
-- it, up to twice as many jobs: else one owner that fills it would lock out all others.
local function is_full(queue, owner, bound)
  local waiting = redis.call('LLEN', list_key(queue))
  if waiting < bound then return false end
  local share = bound / (redis.call('ZCARD', turns_key(queue)) + 1)
  return waiting >= 2 * bound or redis.call('ZCARD', line_key(queue, owner)) >= share
end

-- Why a queue takes no more jobs of an owner: 'draining' or 'full'; nil if it does. Jobs past their deadline make room first.
local function refusal(model, priority, owner, bound)
  end_late(100)
  if redis.call('SISMEMBER', DRAINING, model) == 1 then return 'draining' end
  if is_full(queue_of(model, priority), owner, bound) then return 'full' end
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
  open_books(id, meta, f[1])
  move(id, 'line', true)
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

-- Which models a worker holds, and how fast they are.
local function forget_models_of(worker)
  for _, member in ipairs(redis.call('ZRANGE', WORKERS, 0, -1)) do
    if cjson.decode(member)[2] == worker then redis.call('ZREM', WORKERS, member) end
  end
  redis.call('DEL', speeds_key(worker))
end

local function forget_worker(worker)
  redis.call('ZREM', LEASES, worker)
  redis.call('DEL', held_key(worker), lost_key(worker))
  forget_models_of(worker)
end

-- Counts that a worker died of a job; true if that was once too often, and the job failed. It may wait or run again by now.
local function died_of(id, limit)
  local status = redis.call('HGET', job_key(id), 'status')
  if status ~= 'queued' and status ~= 'started' then return false end
  if redis.call('HINCRBY', job_key(id), 'deaths', 1) < limit then return false end
  end_job(id, 'failed', WORKER_LOST)
  if status == 'started' then ask_to_stop(id) end
  return true
end

-- A worker that is gone gives back all that it held, in two halves that run apart from each other and from all else, so
-- that a job that kills its worker is found: it ends up alone. A job that was alone when its worker's process died `limit`
-- times fails; limit nil: nobody saw the process die, so nothing is counted, unless that is seen later: a GPU that hangs
-- costs a worker its lease first. Returns how many jobs it held.
local function bury(worker, limit)
  local ids, lost = still_held(redis.call('SMEMBERS', held_key(worker))), redis.call('GET', lost_key(worker))
  forget_worker(worker)
  local alone = #ids == 1 and ids[1] or #ids == 0 and lost
  if alone and limit then
    if died_of(alone, limit) then return #ids end
  elseif alone then
    redis.call('SET', lost_key(worker), alone, 'EX', LOST_S)
  end
  for n, id in ipairs(ids) do put_back(id, worker .. (n <= #ids / 2 and '/b' or '/a')) end
  return #ids
end

-- Forgets an ended job, but for what it counted in its owner's usage.
local function forget(id)
  local f = redis.call('HMGET', job_key(id), 'status', 'origin')
  local meta = meta_of(id)
  unregister(id, f[2])
  close_books(id)
  leave_group(id)
  forget_messages(id)
  redis.call('ZADD', PICTURES, 'XX', decimal(NOW + LEFTOVERS_S), id)  -- what a worker may be storing goes too
  redis.call('ZREM', owner_key(meta.owner or ''), id)
  redis.call('DEL', job_key(id), RQ .. 'results:' .. id, events_key(id), preview_key(id), watch_key(id))
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
