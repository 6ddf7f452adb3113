-- What happens to a job, told to those who follow it now, and put down for its webhook.

local WEBHOOK_EVENTS = {
  running = 'started', progress = 'progress', succeeded = 'completed', failed = 'completed', canceled = 'completed',
}

local function take_out(entry)
  redis.call('ZREM', OUTBOX, entry)
  redis.call('HDEL', OUTBOX_ENTRIES, entry)
end

-- Puts down that a webhook is to be told. Of progress one message waits at most; whoever sends it looks how far the job is.
-- A job that starts again after its worker was lost has been told to start.
local function put_out(id, told)
  local entry = id .. ':' .. told
  if told == 'progress' and redis.call('ZSCORE', OUTBOX, entry) then return end
  if told == 'started' and redis.call('HSETNX', job_key(id), 'told_started', 1) == 0 then return end
  redis.call('ZADD', OUTBOX, decimal(NOW), entry)
  redis.call('HSET', OUTBOX_ENTRIES, entry, cjson.encode({at = decimal(NOW), attempt = 0}))
end

-- Keeps an event in the job's stream, says it aloud, and puts it down for the job's webhook if that asked for it.
local function event(id, name, data)
  data = data or '{}'
  local at = redis.call('XADD', events_key(id), 'MAXLEN', '~', MAX_EVENTS, '*', 'event', name, 'data', data)
  redis.call('PUBLISH', 'darkroom:event', table.concat({id, at, name, data}, ' '))
  local told = WEBHOOK_EVENTS[name]
  if not told then return end
  if told == 'completed' then take_out(id .. ':progress') end  -- also where nobody asked for the end
  for _, asked in ipairs((meta_of(id) or {}).webhook or {}) do
    if asked == told then put_out(id, told) end
  end
end

local function forget_messages(id)
  for _, told in pairs(WEBHOOK_EVENTS) do take_out(id .. ':' .. told) end
end
