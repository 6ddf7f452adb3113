-- What an operator sees of all queues and workers at one moment. Reads only.
-- ARGV: seconds that an ended job's record is kept. Returns JSON; in it a list without members may be {}.
-- How many suspects wait, and since when the oldest job does, is told of the first HEAD jobs of each queue: where those are
-- that were put back.
local HEAD = 1000
local lifetime = tonumber(ARGV[1])

local function known_models()
  local known = {}
  for _, model in ipairs(redis.call('HKEYS', CARDS)) do known[model] = true end
  for _, list in ipairs(redis.call('SMEMBERS', RQ .. 'queues')) do
    local name = string.sub(list, #list_key('') + 1)
    local model, priority = string.match(name, '^darkroom%.(.+)%.(%l+)$')
    if model and queue_of(model, priority) == name then known[model] = true end
  end
  local names = {}
  for model in pairs(known) do names[#names + 1] = model end
  table.sort(names)
  return names
end

local function queue_status(queue)
  local oldest, suspects = nil, 0
  for _, id in ipairs(redis.call('LRANGE', list_key(queue), 0, HEAD - 1)) do
    local f = redis.call('HMGET', job_key(id), 'enqueued_at', 'group')
    if f[1] and (not oldest or f[1] < oldest) then oldest = f[1] end
    if f[2] then suspects = suspects + 1 end
  end
  return {
    waiting = redis.call('LLEN', list_key(queue)), suspects = suspects, oldest = oldest,
    running = redis.call('ZCARD', RQ .. 'wip:' .. queue),
    succeeded = redis.call('ZCOUNT', RQ .. 'finished:' .. queue, SECONDS, '+inf'),
    failed = redis.call('ZCOUNT', RQ .. 'failed:' .. queue, SECONDS, '+inf'),
    canceled = redis.call('ZCOUNT', RQ .. 'canceled:' .. queue, SECONDS - lifetime, '+inf'),
  }
end

local function worker_status()
  local workers, names = {}, {}
  local function of(name)
    if not workers[name] then
      workers[name] = {worker = name, models = {}, held = redis.call('SCARD', held_key(name))}
      names[#names + 1] = name
    end
    return workers[name]
  end
  local leases = redis.call('ZRANGE', LEASES, 0, -1, 'WITHSCORES')
  for n = 1, #leases, 2 do of(leases[n]).lease_left_s = tonumber(leases[n + 1]) - NOW end
  local seen = redis.call('ZRANGE', WORKERS, 0, -1, 'WITHSCORES')
  for n = 1, #seen, 2 do
    local pair = cjson.decode(seen[n])
    local worker = of(pair[2])
    worker.models[#worker.models + 1] = pair[1]
    worker.heard_s = NOW - tonumber(seen[n + 1])
  end
  table.sort(names)
  local reply = {}
  for n, name in ipairs(names) do reply[n] = workers[name] end
  return reply
end

local models = {}
for n, model in ipairs(known_models()) do
  local queues = {}
  for p, priority in ipairs(PRIORITIES) do
    queues[p] = queue_status(queue_of(model, priority))
    queues[p].priority = priority
  end
  models[n] = {
    model = model, queues = queues,
    paused = redis.call('SISMEMBER', PAUSED, model) == 1, draining = redis.call('SISMEMBER', DRAINING, model) == 1,
  }
end
return cjson.encode({now = decimal(NOW), models = models, workers = worker_status()})
