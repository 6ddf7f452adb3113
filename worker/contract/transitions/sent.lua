-- What came of an attempt to deliver a message: notes it in the job's log, and takes the message out or puts it off.
-- 'left' is no attempt: the sender cannot read the job, as another may; it is put off, and neither noted nor counted.
-- A sender whose lease ran out puts off nothing that another has taken over; a message that arrived is out in any case.
-- ARGV: 'id:event', when the event was, attempt, 'done' | 'retry' | 'dead' | 'left', the delivery as JSON, seconds to put
-- it off, how many deliveries the log keeps.
local entry, at, attempt, outcome, delivery, delay_s, kept = unpack(ARGV)
local id = string.match(entry, '^(.*):')
if outcome ~= 'left' and redis.call('EXISTS', job_key(id)) == 1 then
  local log = (redis.call('HGET', job_key(id), 'deliveries') or '') .. delivery .. '\n'
  local _, lines = string.gsub(log, '\n', '')
  for _ = 1, lines - tonumber(kept) do log = string.gsub(log, '^[^\n]*\n', '') end
  redis.call('HSET', job_key(id), 'deliveries', log)
end
local text = redis.call('HGET', OUTBOX_ENTRIES, entry)
local message = text and cjson.decode(text)
if not message or message.at ~= at then return end  -- another message by now
if outcome == 'done' then return take_out(entry) end
if message.attempt ~= tonumber(attempt) then return end
if outcome == 'dead' then return take_out(entry) end
if outcome == 'left' then
  message.attempt = message.attempt - 1
  redis.call('HSET', OUTBOX_ENTRIES, entry, cjson.encode(message))
end
redis.call('ZADD', OUTBOX, decimal(NOW + tonumber(delay_s)), entry)
