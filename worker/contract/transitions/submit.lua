-- Puts a job at the end of its queue, unless that takes no more; a second submit of the same id changes nothing.
-- ARGV: id, model, priority, bound of the queue, deadline, then fields and values of RQ's job hash.
-- Returns the position, or why not: 'draining' or 'full'.
local id, model, priority, bound, deadline = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
if redis.call('EXISTS', job_key(id)) == 0 then
  local refused = refusal(model, priority, bound)
  if refused then return refused end
  enqueue(id, model, priority, deadline, {unpack(ARGV, 6)})
end
return position(id, {model = model, priority = priority}) or 0
