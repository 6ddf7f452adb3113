-- What Prometheus is told of all queues and workers, whether any worker lives or none. Reads only.
-- ARGV: seconds after which a silent worker is not counted.
-- Returns JSON: what `load_now` gives, ended (as `note_end` counts), dropped (records that went early), memory (used, and the most that may be),
-- now (Unix seconds), and queues: model, priority, how many jobs wait, and since when the oldest of them does, if any. That is told of the first
-- HEAD jobs of each: where those are that were put back.
local HEAD = 16
local load = load_now(ARGV[1])
load.now, load.queues, load.ended = NOW, {}, redis.call('HGETALL', ENDED)
load.memory, load.dropped = {memory_now()}, tonumber(redis.call('GET', DROPPED) or 0)

local function oldest(queue)
  local first
  for _, id in ipairs(redis.call('LRANGE', list_key(queue), 0, HEAD - 1)) do
    local at = redis.call('HGET', job_key(id), 'enqueued_at')
    if at and (not first or at < first) then first = at end
  end
  return first
end

for _, model in ipairs(redis.call('HKEYS', CARDS)) do
  for _, priority in ipairs(PRIORITIES) do
    local queue = queue_of(model, priority)
    load.queues[#load.queues + 1] = {model, priority, redis.call('LLEN', list_key(queue)), oldest(queue)}
  end
end
return cjson.encode(load)
