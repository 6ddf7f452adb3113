-- Notes how far running jobs are; silent about those that their execution no longer holds.
-- ARGV: id, execution, step, steps of each. Returns 'id:execution' of those of which somebody wants to see previews.
local watched = {}
for i = 1, #ARGV, 4 do
  local id, execution, step, steps = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local f = redis.call('HMGET', job_key(id), 'status', 'execution', 'step')
  if f[1] == 'started' and f[2] == execution then
    if f[3] ~= step then
      redis.call('HSET', job_key(id), 'step', step, 'steps', steps)
      event(id, 'progress', string.format('{"step":%d,"steps":%d}', step, steps))
    end
    if redis.call('EXISTS', watch_key(id)) == 1 then watched[#watched + 1] = id .. ':' .. execution end
  end
end
return watched
