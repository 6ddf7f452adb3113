-- Ends jobs past their deadline, and takes from workers whose lease has lapsed what they hold. Anybody may call it, about
-- every two seconds. If nobody did for a while, Redis was away perhaps, and no worker could renew: all get one more lease.
-- Messages to webhooks that nobody sends are dropped after a day.
-- ARGV: how many jobs past their deadline to end at most. Returns how many ended so, and how many were taken.
local REAPED_AT, GRACED_AT = 'darkroom:reaped_at', 'darkroom:graced_at'
local late, taken = end_late(tonumber(ARGV[1])), 0
local function since(key) return NOW - tonumber(redis.call('GET', key) or 0) end
local gap = since(REAPED_AT)
redis.call('SET', REAPED_AT, decimal(NOW))
if gap > LEASE_S / 2 and since(GRACED_AT) > 3 * LEASE_S then  -- seldom: a slow reaper must reap too
  redis.call('SET', GRACED_AT, decimal(NOW))
  for _, worker in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
    redis.call('ZADD', LEASES, 'XX', 'GT', decimal(NOW + LEASE_S), worker)
  end
else
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', decimal(NOW))) do taken = taken + bury(worker) end
end
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', OUTBOX, '-inf', decimal(NOW - 86400), 'LIMIT', 0, 100)) do
  take_out(entry)
end
return {late, taken}
