-- Ends waiting jobs as canceled, or forgets failed ones: their records, events and results.
-- ARGV: 'queued' or 'failed', then ids. Returns how many; those that are something else by now are left alone.
local asked, purged = ARGV[1], 0

for n = 2, #ARGV do
  local id = ARGV[n]
  if meta_of(id) and redis.call('HGET', job_key(id), 'status') == asked then
    if asked == 'queued' then end_job(id, 'canceled', CANCELED) else forget(id) end
    purged = purged + 1
  end
end
return purged
