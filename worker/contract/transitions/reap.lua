-- Ends jobs past their deadline, and takes from workers whose lease has lapsed what they hold. Anybody may call it, about
-- every two seconds. If nobody did for a while, Redis was away perhaps, and no worker could renew: all get one more lease.
-- Messages to webhooks that nobody sends are dropped after a day, and ended jobs' records where Redis is nearly full.
-- ARGV: how many jobs past their deadline to end at most. Returns how many ended so, and how many were taken.
local REAPED_AT, GRACED_AT = 'darkroom:reaped_at', 'darkroom:graced_at'
local AT_ONCE = 100

-- The ended jobs of all queues, some of each, those first whose time is up first. What expired leaves its registry.
local function ended_longest()
  local found = {}
  for _, list in ipairs(redis.call('SMEMBERS', RQ .. 'queues')) do
    local queue = string.match(list, '^' .. list_key('(darkroom%..*)$'))
    for _, status in ipairs(queue and {'finished', 'failed', 'canceled'} or {}) do
      for _, id in ipairs(redis.call('ZRANGE', RQ .. status .. ':' .. queue, 0, AT_ONCE - 1)) do
        local ttl = redis.call('TTL', job_key(id))
        if ttl == -2 then redis.call('ZREM', RQ .. status .. ':' .. queue, id) end
        if ttl >= 0 and meta_of(id) then found[#found + 1] = {id = id, ttl = ttl} end
      end
    end
  end
  table.sort(found, function(a, b) return a.ttl < b.ttl or (a.ttl == b.ttl and a.id < b.id) end)
  return found
end

-- Forgets some ended jobs while Redis is nearly full, so that it does not refuse new ones. Those stay that ended only now, and
-- those of which a webhook is yet to be told.
local function make_room()
  local used, most = memory_now()
  if most == 0 or used < ROOM * most then return end
  local dropped = 0
  for _, job in ipairs(ended_longest()) do
    local lifetime = tonumber(redis.call('HGET', job_key(job.id), 'result_ttl') or 0)
    if lifetime - job.ttl >= ROOM_KEPT_S and not redis.call('ZSCORE', OUTBOX, job.id .. ':completed') then
      forget(job.id)
      dropped = dropped + 1
      if dropped == AT_ONCE then break end
    end
  end
  redis.call('INCRBY', DROPPED, dropped)
end

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
make_room()
return {late, taken}
