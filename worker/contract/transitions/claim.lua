-- Starts up to `want` jobs: high before normal before low; one of each model in turn; first come, first served in a queue.
-- Jobs of another schema stay where they are, late ones fail, ids without a job are dropped, paused models are passed over.
-- A group of suspects (see `bury`) starts whole, and only where nothing else runs: a worker that meets one while it holds
-- other jobs gets no more until it is idle.
-- ARGV: worker, schema, want, how many jobs it holds, number of models, models, then `want` execution ids.
-- Returns for each: id, execution, data, enqueued_at, started_at, group of suspects or ''.
local worker, schema, want, holding, models = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local CHUNK = 50
local reply, taken, closed = {}, 0, false

-- The next job of one queue that may start, taken off its list, with its group; nil at its end. What stays is counted in `left`.
local function take(scan)
  while not closed do
    scan.at = scan.at + 1
    if scan.at > #scan.ids then
      scan.ids, scan.at = redis.call('LRANGE', scan.list, scan.left, scan.left + CHUNK - 1), 1
      if #scan.ids == 0 then return nil end
    end
    local id = scan.ids[scan.at]
    local status = redis.call('HGET', job_key(id), 'status')
    local meta = meta_of(id)
    if status ~= 'queued' then
      redis.call('LREM', scan.list, 1, id)
    elseif not meta or meta.schema ~= schema then
      scan.left = scan.left + 1
    elseif not end_if_late(id, status, meta) then
      local group = redis.call('HGET', job_key(id), 'group')
      if group and holding + taken > 0 then
        closed = true
        return nil
      end
      redis.call('LREM', scan.list, 1, id)
      return id, meta, group
    end
  end
end

local function start(id, meta, group)
  taken = taken + 1
  local execution, queue = ARGV[5 + models + taken], queue_of(meta.model, meta.priority)
  local key, pair, at = job_key(id), id .. ':' .. execution, iso_now()
  local ttl = math.max(0, math.ceil(tonumber(meta.deadline) - NOW)) + STARTED_MARGIN_S
  local ours = RQ .. 'worker:' .. worker .. ':executions'
  redis.call('HSET', RQ .. 'execution:' .. pair, 'id', execution, 'job_id', id, 'created_at', decimal(NOW),
    'last_heartbeat', decimal(NOW), 'worker_name', worker)
  redis.call('EXPIRE', RQ .. 'execution:' .. pair, ttl)
  redis.call('ZADD', RQ .. 'executions:' .. id, SECONDS + ttl + 60, execution)
  redis.call('EXPIRE', RQ .. 'executions:' .. id, ttl + 60)
  redis.call('ZADD', RQ .. 'wip:' .. queue, SECONDS + ttl, pair)
  redis.call('SADD', ours, pair)
  redis.call('EXPIRE', ours, ttl + 60)
  redis.call('SADD', held_key(worker), pair)
  redis.call('ZADD', LEASES, decimal(NOW + LEASE_S), worker)
  redis.call('HSET', key, 'status', 'started', 'started_at', at, 'last_heartbeat', at, 'worker_name', worker,
    'execution', execution)
  -- A job that an operator put back with RQ's tools has a past.
  redis.call('HDEL', key, 'outcome', 'step', 'steps', 'cancel_requested')
  redis.call('PERSIST', key)
  redis.call('ZADD', DEADLINES, decimal(meta.deadline), id)
  event(id, 'running')
  local f = redis.call('HMGET', key, 'data', 'enqueued_at')
  for _, value in ipairs({id, execution, f[1], f[2], at, group or ''}) do reply[#reply + 1] = value end
end

-- The rest of a group whose first job has started; members that have ended since are forgotten.
local function start_group(group)
  local held = {}
  for m = 1, models do held[ARGV[5 + m]] = redis.call('SISMEMBER', PAUSED, ARGV[5 + m]) == 0 end
  local ids = redis.call('SMEMBERS', suspects_key(group))
  local since = {}
  for _, id in ipairs(ids) do since[id] = redis.call('HGET', job_key(id), 'enqueued_at') or '' end
  table.sort(ids, function(a, b) return since[a] < since[b] end)
  for _, id in ipairs(ids) do
    local f, meta = redis.call('HMGET', job_key(id), 'status', 'group', 'origin'), meta_of(id)
    if f[1] == 'queued' and f[2] == group and taken < want and held[meta.model] and meta.schema == schema
        and not end_if_late(id, f[1], meta) then
      redis.call('LREM', list_key(f[3]), 1, id)
      start(id, meta, group)
    end
  end
  closed = true
end

end_late(100)
for _, priority in ipairs(PRIORITIES) do
  local open = {}
  for m = 1, models do
    local list = list_key(queue_of(ARGV[5 + m], priority))
    if redis.call('SISMEMBER', PAUSED, ARGV[5 + m]) == 0 then
      open[#open + 1] = {list = list, ids = {}, at = 0, left = 0}
    end
  end
  while #open > 0 and taken < want and not closed do
    local still = {}
    for _, scan in ipairs(open) do
      if taken == want then break end
      local id, meta, group = take(scan)
      if id then
        start(id, meta, group)
        if group then start_group(group) end
        still[#still + 1] = scan
      end
    end
    open = still
  end
end
return reply
