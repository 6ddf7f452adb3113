-- A worker lives: renews its lease, notes which models it holds and how fast they are, and settles which jobs are its own.
-- Jobs that Redis gave to it in an answer that never arrived, and jobs that it let go of, go back to their queues.
-- ARGV: worker, number of models, each model and its megapixel-steps a second or '', then 'id:execution' of each job that it
-- holds.
-- Returns those that should stop: canceled, past their deadline, or no longer its own.
local worker, models = ARGV[1], tonumber(ARGV[2])
redis.call('ZADD', LEASES, decimal(NOW + LEASE_S), worker)
redis.call('DEL', lost_key(worker))  -- it did not die of that one
redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', decimal(NOW - 60))
forget_models_of(worker)
for n = 3, 1 + 2 * models, 2 do
  local model, speed = ARGV[n], ARGV[n + 1]
  redis.call('ZADD', WORKERS, decimal(NOW), cjson.encode({model, worker}))
  if speed ~= '' then
    redis.call('HSET', speeds_key(worker), model, speed)
    redis.call('EXPIRE', speeds_key(worker), 60)
    redis.call('HSET', SPEED, model, speed)
  end
end

local listed, stop = {}, {}
for n = 3 + 2 * models, #ARGV do
  local id, execution = string.match(ARGV[n], '^(.*):([^:]*)$')
  local f = redis.call('HMGET', job_key(id), 'status', 'execution', 'cancel_requested')
  local ours = f[1] == 'started' and f[2] == execution
  listed[ARGV[n]] = true
  if not ours and f[1] ~= 'queued' and f[1] ~= 'started' and entry_of(id) then cross_out(id) end  -- a tool of RQ's ended it
  if not ours or f[3] or end_if_late(id, 'started', meta_of(id)) then stop[#stop + 1] = ARGV[n] end
end
local unlisted = {}
for _, pair in ipairs(redis.call('SMEMBERS', held_key(worker))) do
  if not listed[pair] then unlisted[#unlisted + 1] = pair end
end
for _, id in ipairs(still_held(unlisted)) do put_back(id) end
for _, pair in ipairs(unlisted) do redis.call('SREM', held_key(worker), pair) end
return stop
