-- Ends a queued job as canceled; asks the worker of a started one to stop; leaves an ended one alone.
-- ARGV: id. Returns the job's record.
local id = ARGV[1]
local meta = meta_of(id)
if not meta then return nil end
local status = redis.call('HGET', job_key(id), 'status')
if (status == 'queued' or status == 'started') and not end_if_late(id, status, meta) then
  if status == 'queued' then
    end_job(id, 'canceled', CANCELED)
  else
    redis.call('HSET', job_key(id), 'cancel_requested', 1)
    ask_to_stop(id)
  end
end
return record(id)
