-- Ends jobs past their deadline, and takes from workers whose lease has lapsed what they hold. Anybody may call it, about
-- every two seconds. If nobody did for a while, Redis was away perhaps, and no worker could renew: all get one more lease.
-- Messages to webhooks that nobody sends are dropped after a day, and ended jobs' records where Redis is nearly full.
-- ARGV: how many jobs past their deadline to end at most. Returns how many ended so, and how many were taken.
local REAPED_AT, GRACED_AT = 'darkroom:reaped_at', 'darkroom:graced_at'
local AT_ONCE = 100

-- Takes jobs whose records expired off the list, and off those of RQ, which forget them when others end in the same queue.
local function forget_expired()
  for _, record in ipairs(redis.call('ZRANGE', RECORDS, 0, AT_ONCE - 1)) do
    local queue, id = string.match(record, '^(.*) (.*)$')
    if redis.call('EXISTS', job_key(id)) == 1 then return end
    unregister(id, queue)
  end
end

-- Forgets those that ended first while Redis is nearly full, so that it does not refuse new ones; but none that ended only
-- now. One of which a webhook is yet to be told is looked at again as if it ended now.
local function make_room()
  local used, most = memory_now()
  if most == 0 or used < ROOM * most then return end
  local dropped = 0
  for _, record in ipairs(redis.call('ZRANGEBYSCORE', RECORDS, '-inf', SECONDS - ROOM_KEPT_S, 'LIMIT', 0, AT_ONCE)) do
    local queue, id = string.match(record, '^(.*) (.*)$')
    local status = meta_of(id) and redis.call('HGET', job_key(id), 'status')
    if not status or status == 'queued' or status == 'started' then  -- a tool of RQ's took it
      redis.call('ZREM', RECORDS, record)
    elseif redis.call('ZSCORE', OUTBOX, id .. ':completed') then
      redis.call('ZADD', RECORDS, SECONDS, record)
    else
      forget(id)
      dropped = dropped + 1
    end
  end
  if dropped > 0 then redis.call('INCRBY', DROPPED, dropped) end
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
forget_expired()
make_room()
return {late, taken}
