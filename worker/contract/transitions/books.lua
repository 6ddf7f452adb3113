-- What is kept of every job that has not ended, so that all of it can be crossed out whoever ended the job: a transition, or
-- a tool of RQ's. Whatever is done twice here is as good as done once.
-- An entry: owner, queue, model, work (pixel-steps), place (what sorts its owner's jobs), where ('line', 'run' or nothing).

local function count(field, by)
  if by ~= 0 and redis.call('HINCRBY', LOAD, field, integer(by)) == 0 then redis.call('HDEL', LOAD, field) end
end

local function weigh(entry, sign)
  if entry.where == 'line' then
    count('jobs:' .. entry.queue, sign)
    count('waiting:' .. entry.queue, sign * entry.work)
  elseif entry.where == 'run' then
    count('runs:' .. entry.model, sign)
    count('running:' .. entry.model, sign * entry.work)
  end
end

-- Workers (model, worker, megapixel-steps a second or nothing), speed (by model, as last measured), load (see `weigh`); for
-- JSON, in which a list without members may be {}. seen_s: a worker that was silent for longer is not counted.
local function load_now(seen_s)
  local workers = {}
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, decimal(NOW - tonumber(seen_s)), '+inf')) do
    local pair = cjson.decode(member)
    workers[#workers + 1] = {pair[1], pair[2], redis.call('HGET', speeds_key(pair[2]), pair[1])}
  end
  local function all(key)
    local found, flat = {}, redis.call('HGETALL', key)
    for n = 1, #flat, 2 do found[flat[n]] = tonumber(flat[n + 1]) end
    return found
  end
  return {workers = workers, speed = all(SPEED), load = all(LOAD)}
end

local function entry_of(id)
  local text = redis.call('HGET', OPEN, id)
  return text and cjson.decode(text)
end

-- Moves a job to 'line', 'run' or nowhere. again: it had its turn already.
local function move(id, where, again)
  local entry = entry_of(id)
  if not entry or entry.where == where then return end
  if entry.where == 'line' then leave_line(entry.queue, entry.owner, id) end
  weigh(entry, -1)
  entry.where = where
  weigh(entry, 1)
  if where == 'line' then line_up(entry.queue, entry.owner, id, entry.place, again) end
  redis.call('HSET', OPEN, id, cjson.encode(entry))
end

-- meta: of a job that may not be ours, an empty one. nth: of those opened in one transition.
local function open_books(id, meta, queue, nth)
  if redis.call('HEXISTS', OPEN, id) == 1 then return end
  local owner = meta.owner or ''
  local place = integer(SECONDS * 1e6 + MICROS + (nth or 0))  -- as text: cjson keeps 14 digits
  redis.call('HSET', OPEN, id, cjson.encode({
    owner = owner, queue = queue, model = meta.model or '', work = meta.work or 0, place = place,
  }))
  if not meta.schema then return end
  redis.call('ZADD', DEADLINES, decimal(meta.deadline), id)
  redis.call('SADD', active_key(owner), id)
  redis.call('ZADD', owner_key(owner), 0, id)
  local lifetime = tonumber(redis.call('HGET', job_key(id), 'result_ttl') or 0)  -- the list outlives all of its jobs
  local longest = math.max(0, math.ceil(meta.deadline - NOW)) + STARTED_MARGIN_S + lifetime
  for _, only in ipairs({'NX', 'GT'}) do redis.call('EXPIRE', owner_key(owner), longest, only) end
end

local function set_lifetime(id, lifetime)
  for _, key in ipairs({job_key(id), RQ .. 'results:' .. id, events_key(id)}) do
    redis.call('EXPIRE', key, lifetime)
  end
end

local function close_books(id)
  local entry = entry_of(id)
  if not entry then return end
  move(id, nil)
  redis.call('HDEL', OPEN, id)
  redis.call('ZREM', DEADLINES, id)
  redis.call('SREM', active_key(entry.owner), id)
end

-- Crosses out a job that a tool of RQ's took out of our hands. One that it ended gets a lifetime, for RQ gives it none; of one
-- that it deleted nothing stays.
local function cross_out(id)
  local f, entry = redis.call('HMGET', job_key(id), 'status', 'result_ttl'), entry_of(id)
  if f[1] == 'queued' or f[1] == 'started' then return move(id, nil) end
  if f[2] then set_lifetime(id, tonumber(f[2])) end
  if f[2] and entry then redis.call('ZADD', RECORDS, 'NX', SECONDS, entry.queue .. ' ' .. id) end
  close_books(id)
  if redis.call('EXISTS', job_key(id)) == 1 then return end
  redis.call('DEL', RQ .. 'results:' .. id, events_key(id))
  if entry then redis.call('ZREM', owner_key(entry.owner), id) end
end

-- Puts a job that a tool of RQ's put into a list, or an older Darkroom, into its line; what cannot start leaves the list.
local function line_up_listed(id, queue, nth)
  if redis.call('HGET', job_key(id), 'status') ~= 'queued' then
    redis.call('LREM', list_key(queue), -1, id)
    return
  end
  local entry = entry_of(id)
  if entry and (entry.queue ~= queue or entry.where == 'run') then close_books(id) end
  open_books(id, meta_of(id) or {}, queue, nth)
  move(id, 'line')
end

-- The lines of a queue follow RQ's list, where one of RQ's tools put jobs in or took them out. True if any job waits.
local function follow_list(queue)
  local length = redis.call('LLEN', list_key(queue))
  if length == tonumber(redis.call('HGET', LOAD, 'jobs:' .. queue) or 0) then return length > 0 end
  local listed, ids = {}, redis.call('LRANGE', list_key(queue), 0, -1)
  for n, id in ipairs(ids) do
    if listed[id] then
      redis.call('LREM', list_key(queue), -1, id)
    else
      listed[id] = true
      local entry = entry_of(id)
      if not entry or entry.where ~= 'line' or entry.queue ~= queue then line_up_listed(id, queue, n) end
    end
  end
  for _, owner in ipairs(redis.call('ZRANGE', turns_key(queue), 0, -1)) do
    for _, id in ipairs(redis.call('ZRANGE', line_key(queue, owner), 0, -1)) do
      if not listed[id] then cross_out(id) end
    end
  end
  return redis.call('EXISTS', turns_key(queue)) == 1
end

-- How many jobs of the same model go first; nil if it does not wait.
local function position(id, meta)
  local entry, ahead = entry_of(id), 0
  if not entry or entry.where ~= 'line' then return nil end
  for _, priority in ipairs(PRIORITIES) do
    if priority == meta.priority then break end
    ahead = ahead + redis.call('LLEN', list_key(queue_of(meta.model, priority)))
  end
  return ahead + ahead_of(entry.queue, entry.owner, redis.call('ZRANK', line_key(entry.queue, entry.owner), id))
end

-- What an owner used, by day and model: all jobs that ended, the pictures and pixel-steps of those that succeeded, and the
-- milliseconds that workers said they took.
local function use(meta, counter, by)
  if by <= 0 then return end
  local key = 'darkroom:usage:' .. today()
  redis.call('HINCRBY', key, cjson.encode({meta.owner or '', meta.model, counter}), integer(by))
  redis.call('EXPIRE', key, USAGE_S)
end

local function note_usage(meta, status, gpu_ms)
  use(meta, 'jobs', 1)
  if status == 'finished' then
    use(meta, 'pictures', meta.pictures or 1)
    use(meta, 'pixel_steps', meta.work or 0)
  end
  use(meta, 'gpu_ms', gpu_ms or 0)
end

-- A job was ended by others while an execution ran: what that took of the GPU is told yet, also if the job is forgotten.
local function expect_gpu_ms(id, execution, meta)
  local counted = cjson.encode({owner = meta.owner, model = meta.model})
  redis.call('SET', untold_key(id, execution), counted, 'EX', UNTOLD_S)
end

local function tell_gpu_ms(id, execution, gpu_ms)
  local counted = redis.call('GETDEL', untold_key(id, execution))
  if counted then use(cjson.decode(counted), 'gpu_ms', gpu_ms) end
end

-- Lets an owner's list go of the oldest jobs, as their records expire: more of them than come in.
local function forget_gone(owner)
  for _, id in ipairs(redis.call('ZRANGE', owner_key(owner), 0, 99)) do
    if redis.call('EXISTS', job_key(id)) == 1 then return end
    redis.call('ZREM', owner_key(owner), id)
  end
end
