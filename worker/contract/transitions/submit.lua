-- Puts a job at the end of its queue, unless that is full; a second submit of the same id changes nothing.
-- ARGV: id, model, priority, bound of the queue, deadline, then fields and values of RQ's job hash.
-- Returns the position, or -1 when the queue is full.
local id, model, priority, bound, deadline = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local queue = queue_of(model, priority)
local list = list_key(queue)
end_late(100)
if redis.call('EXISTS', job_key(id)) == 0 then
  if redis.call('LLEN', list) >= bound then return -1 end
  redis.call('HSET', job_key(id), unpack(ARGV, 6))
  redis.call('HSET', job_key(id), 'status', 'queued', 'origin', queue, 'enqueued_at', iso_now())
  redis.call('SADD', RQ .. 'queues', list)
  redis.call('RPUSH', list, id)
  redis.call('ZADD', DEADLINES, deadline, id)
  event(id, 'queued')
  redis.call('PUBLISH', 'darkroom:submitted', model)
end
return position(id, {model = model, priority = priority}) or 0
