-- Starts up to `want` jobs: high before normal before low; one of each model in turn; first come, first served in a queue.
-- Jobs of another schema stay where they are, late ones fail, ids without a job are dropped.
-- ARGV: worker, schema, want, number of models, models, then `want` execution ids.
-- Returns for each: id, execution, data, enqueued_at, started_at.
local worker, schema, want, models = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local CHUNK = 50

-- The next job of one queue that may start, taken off its list; nil at its end. What stays is counted in `left`.
local function take(scan)
  while true do
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
      redis.call('LREM', scan.list, 1, id)
      return id, meta
    end
  end
end

local function start(id, meta, queue, execution)
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
  redis.call('HSET', key, 'status', 'started', 'started_at', at, 'last_heartbeat', at, 'worker_name', worker,
    'execution', execution)
  -- A job that an operator put back with RQ's tools has a past.
  redis.call('HDEL', key, 'outcome', 'step', 'steps', 'cancel_requested')
  redis.call('PERSIST', key)
  redis.call('ZADD', DEADLINES, decimal(meta.deadline), id)
  event(id, 'running')
  local f = redis.call('HMGET', key, 'data', 'enqueued_at')
  return f[1], f[2], at
end

end_late(100)
local reply, taken = {}, 0
for _, priority in ipairs(PRIORITIES) do
  local open = {}
  for m = 1, models do
    local queue = queue_of(ARGV[4 + m], priority)
    open[m] = {queue = queue, list = list_key(queue), ids = {}, at = 0, left = 0}
  end
  while #open > 0 and taken < want do
    local still = {}
    for _, scan in ipairs(open) do
      if taken == want then break end
      local id, meta = take(scan)
      if id then
        taken = taken + 1
        local execution = ARGV[4 + models + taken]
        local data, enqueued_at, started_at = start(id, meta, scan.queue, execution)
        for _, value in ipairs({id, execution, data, enqueued_at, started_at}) do reply[#reply + 1] = value end
        still[#still + 1] = scan
      end
    end
    open = still
  end
end
return reply
