-- Forgets a model that nobody serves and nobody waits for: its card and speed, what an operator said of it, and that RQ has
-- its queues. Its ended jobs stay as long as their records; a worker that offers it makes it known again.
-- ARGV: model, seconds after which a silent worker is not counted.
-- Returns {workers that hold it, jobs of it that wait or run}: it was forgotten if there are none.
local model, seen_s = ARGV[1], tonumber(ARGV[2])
local workers, jobs = 0, 0
for _, member in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, decimal(NOW - seen_s), '+inf')) do
  if cjson.decode(member)[1] == model then workers = workers + 1 end
end
for _, priority in ipairs(PRIORITIES) do
  local queue = queue_of(model, priority)
  jobs = jobs + redis.call('LLEN', list_key(queue)) + redis.call('ZCARD', RQ .. 'wip:' .. queue)
end
if workers + jobs == 0 then
  redis.call('HDEL', CARDS, model)
  redis.call('HDEL', SPEED, model)
  redis.call('SREM', PAUSED, model)
  redis.call('SREM', DRAINING, model)
  for _, priority in ipairs(PRIORITIES) do redis.call('SREM', RQ .. 'queues', list_key(queue_of(model, priority))) end
end
return {workers, jobs}
