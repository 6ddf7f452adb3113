-- Starts up to `want` jobs: high before normal before low; one of each model in turn; in a queue one of each owner in
-- turn; first come, first served of an owner.
-- Jobs of a newer schema stay where they are, late ones fail, ids without a job are dropped, paused models are passed over.
-- A group of suspects (see `bury`) starts whole, and only where nothing else runs: a worker that meets one while it holds
-- other jobs gets no more until it is idle. One that has waited for long goes before all else, for a worker that always has
-- jobs of a higher class would never be idle: one worker gets nothing until then.
-- A worker that is busy leaves jobs alone for a moment, for one with nothing to do may be about to claim them.
-- ARGV: worker, schema, want, how many jobs it holds, for how many microseconds it leaves jobs alone, number of models, models,
-- then `want` execution ids.
-- Returns for each: id, execution, data, enqueued_at, started_at, group of suspects or ''.
local worker, schema, want, holding = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local spare_us, models = tonumber(ARGV[5]), tonumber(ARGV[6])
local reply, taken, closed = {}, 0, false

-- Whether all that waits of a model came just now. If any has waited for longer, no worker has nothing to do: all of it may
-- be taken. RQ's list begins with what came first.
local function is_left_alone(model)
  if spare_us == 0 then return false end
  for _, priority in ipairs(PRIORITIES) do
    local id = redis.call('LINDEX', list_key(queue_of(model, priority)), 0)
    local entry = id and entry_of(id)
    if id and not (entry and SECONDS * 1e6 + MICROS - tonumber(entry.place) < spare_us) then return false end
  end
  return true
end

-- The next job of one queue that may start: id, meta, group, owner and turn; nil if there is none.
-- scan.stay counts the jobs that stay where they are, by owner; scan.passed the owners all of whose jobs stay.
local function take(scan)
  while not closed do
    local head = redis.call('ZRANGE', turns_key(scan.queue), scan.passed, scan.passed, 'WITHSCORES')
    if #head == 0 then return nil end
    local owner, stay = head[1], scan.stay[head[1]] or 0
    local id = redis.call('ZRANGE', line_key(scan.queue, owner), stay, stay)[1]
    local status = id and redis.call('HGET', job_key(id), 'status')
    local meta = id and meta_of(id)
    if not id then
      scan.passed = scan.passed + 1
    elseif status ~= 'queued' then
      redis.call('LREM', list_key(scan.queue), 1, id)
      cross_out(id)
    elseif not meta or meta.schema > schema then
      scan.stay[owner] = stay + 1
    elseif not end_if_late(id, status, meta) then
      local group = redis.call('HGET', job_key(id), 'group')
      if group and holding + taken > 0 then
        closed = true
        return nil
      end
      return id, meta, group, owner, tonumber(head[2])
    end
  end
end

local function start(id, meta, group)
  taken = taken + 1
  local execution, queue = ARGV[6 + models + taken], redis.call('HGET', job_key(id), 'origin')
  local key, pair, at = job_key(id), id .. ':' .. execution, iso_now()
  redis.call('LREM', list_key(queue), 1, id)
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
  redis.call('ZREM', PICTURES, id)
  open_books(id, meta, queue)
  move(id, 'run')
  event(id, 'running')
  local f = redis.call('HMGET', key, 'data', 'enqueued_at')
  for _, value in ipairs({id, execution, f[1], f[2], at, group or ''}) do reply[#reply + 1] = value end
end

-- The rest of a group whose first job has started; members that have ended since are forgotten.
local function start_group(group)
  local held = {}
  for m = 1, models do held[ARGV[6 + m]] = redis.call('SISMEMBER', PAUSED, ARGV[6 + m]) == 0 end
  local ids = redis.call('SMEMBERS', suspects_key(group))
  local since = {}
  for _, id in ipairs(ids) do since[id] = redis.call('HGET', job_key(id), 'enqueued_at') or '' end
  table.sort(ids, function(a, b) return since[a] < since[b] end)
  for _, id in ipairs(ids) do
    local f, meta = redis.call('HMGET', job_key(id), 'status', 'group'), meta_of(id)
    if f[1] == 'queued' and f[2] == group and taken < want and held[meta.model] and meta.schema <= schema
        and not end_if_late(id, f[1], meta) then
      start(id, meta, group)
    end
  end
  closed = true
end

-- The queue whose next job is a suspect that has waited for long, if it is this worker's to make room for it.
local function overdue(models_)
  for _, priority in ipairs(PRIORITIES) do
    for _, model in ipairs(models_) do
      local queue = queue_of(model, priority)
      local owner = follow_list(queue) and redis.call('ZRANGE', turns_key(queue), 0, 0)[1]
      local id = owner and redis.call('ZRANGE', line_key(queue, owner), 0, 0)[1]
      local group = id and redis.call('HGET', job_key(id), 'group')
      if group and SUSPECTS_S - redis.call('TTL', suspects_key(group)) > SUSPECTS_WAIT_S then
        local by = redis.call('GET', yields_key(group))
        if not by or by == worker then
          redis.call('SET', yields_key(group), worker, 'EX', YIELD_S)
          return queue
        end
      end
    end
  end
end

-- Starts jobs of these queues, one of each in turn.
local function serve(open)
  while #open > 0 and taken < want and not closed do
    local still = {}
    for _, scan in ipairs(open) do
      if taken == want then break end
      local id, meta, group, owner, turn = take(scan)
      if id then
        start(id, meta, group)
        take_turn(scan.queue, owner, turn)
        if group then start_group(group) end
        still[#still + 1] = scan
      end
    end
    open = still
  end
end

local function scan_of(queue) return {queue = queue, passed = 0, stay = {}} end

end_late(100)
local open_models = {}
for m = 1, models do
  local model = ARGV[6 + m]
  if redis.call('SISMEMBER', PAUSED, model) == 0 and not is_left_alone(model) then open_models[#open_models + 1] = model end
end
local first = overdue(open_models)
if first and holding > 0 then return reply end
if first then serve({scan_of(first)}) end
for _, priority in ipairs(PRIORITIES) do
  local open = {}
  for _, model in ipairs(open_models) do
    local queue = queue_of(model, priority)
    if follow_list(queue) then open[#open + 1] = scan_of(queue) end
  end
  serve(open)
end
return reply
