-- Starts a new life of a job that failed or was canceled: at the end of its queue, with a deadline of its own and without
-- a past, but for its events, what was delivered to its webhook, and RQ's stream of results. What its webhook was not told
-- yet of the earlier life would be told of this one, so it is forgotten. A job whose worker died while it ran alone stays apart.
-- ARGV: id, bound of the queue, then fields and values of RQ's job hash.
-- Returns the position, or why not: 'gone', 'draining', 'full', or the status of a job that has not failed.
local id, bound = ARGV[1], tonumber(ARGV[2])
local key, meta = job_key(id), meta_of(id)
if not meta then return 'gone' end
local f = redis.call('HMGET', key, 'status', 'origin', 'worker_name', 'deaths', 'deliveries')
local status, queue, worker, deaths = f[1], f[2], f[3], f[4]
if status ~= 'failed' and status ~= 'canceled' and status ~= 'stopped' then return status end
local refused = refusal(meta.model, meta.priority, meta.owner or '', bound)
if refused then return refused end
forget_executions(id, queue, worker)  -- a tool of RQ's that ends a job leaves them
unregister(id, queue)
leave_group(id)
forget_messages(id)
redis.call('DEL', key)
redis.call('PERSIST', RQ .. 'results:' .. id)
redis.call('PERSIST', events_key(id))
enqueue(id, meta.model, meta.priority, {unpack(ARGV, 3)})
if f[5] then redis.call('HSET', key, 'deliveries', f[5]) end
if deaths then set_apart(id, 'retry/' .. id) end
return position(id, meta)
