-- Keeps the latest preview of a running job for a short while.
-- ARGV: id, execution, step, the picture's bytes, seconds that it is kept.
local id, execution, step = ARGV[1], ARGV[2], ARGV[3]
local f = redis.call('HMGET', job_key(id), 'status', 'execution')
if f[1] == 'started' and f[2] == execution then
  redis.call('SET', preview_key(id), ARGV[4], 'EX', ARGV[5])
  event(id, 'preview', string.format('{"step":%d}', step))
end
