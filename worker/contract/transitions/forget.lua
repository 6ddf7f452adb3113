-- Forgets a job and all that was said of it; one that has not ended is canceled first, and its worker told to stop.
-- ARGV: id. Returns 1, or 0 if there is no such job.
local id = ARGV[1]
if not meta_of(id) then return 0 end
local status = redis.call('HGET', job_key(id), 'status')
if status == 'started' then ask_to_stop(id) end
if status == 'queued' or status == 'started' then end_job(id, 'canceled', CANCELED) end
forget(id)
return 1
