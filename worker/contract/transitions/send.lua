-- Gives messages that are due to a sender of webhooks. Others get them once its lease has run out and it said nothing.
-- ARGV: sender, how many at most, seconds of the lease. Returns for each: 'id:event', attempt from 1, when the event was.
-- Messages of jobs whose records are gone are dropped.
local sender, most, lease_s = ARGV[1], ARGV[2], tonumber(ARGV[3])
local reply = {}
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', OUTBOX, '-inf', decimal(NOW), 'LIMIT', 0, most)) do
  local text = redis.call('HGET', OUTBOX_ENTRIES, entry)
  if text and redis.call('EXISTS', job_key(string.match(entry, '^(.*):'))) == 1 then
    local message = cjson.decode(text)
    message.attempt, message.sender = message.attempt + 1, sender
    redis.call('HSET', OUTBOX_ENTRIES, entry, cjson.encode(message))
    redis.call('ZADD', OUTBOX, decimal(NOW + lease_s), entry)
    for _, value in ipairs({entry, message.attempt, message.at}) do reply[#reply + 1] = value end
  else
    take_out(entry)
  end
end
return reply
