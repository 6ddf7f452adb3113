-- Puts a job at the end of its queue, unless that takes no more; a second submit of the same id changes nothing.
-- With an idempotency key the first job of that key stands for all later ones, as long as its record is kept.
-- ARGV: id, model, priority, bound of the queue, owner, how many jobs it may have at once (-1: any number),
-- idempotency key or '', fingerprint of the request, seconds that the key is kept, then fields and values of RQ's job hash.
-- Returns {id, position}, or why not: {'draining'}, {'full'}, {'many'}, {'reused'}.
local id, model, priority, bound = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local owner, most, key, fingerprint, kept_s = ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9]

if key ~= '' then
  local first = redis.call('HMGET', idempotency_key(key), 'id', 'position', 'fingerprint')
  if first[1] and redis.call('EXISTS', job_key(first[1])) == 1 then
    if first[3] ~= fingerprint then return {'reused'} end
    return {first[1], tonumber(first[2])}
  end
end

if redis.call('EXISTS', job_key(id)) == 0 then
  local refused = refusal(model, priority, owner, bound)
  if not refused and most >= 0 and redis.call('SCARD', active_key(owner)) >= most then refused = 'many' end
  if refused then return {refused} end
  enqueue(id, model, priority, {unpack(ARGV, 10)})
  forget_gone(owner)
end
local at = position(id, {model = model, priority = priority}) or 0
if key ~= '' then
  redis.call('HSET', idempotency_key(key), 'id', id, 'position', at, 'fingerprint', fingerprint)
  redis.call('EXPIRE', idempotency_key(key), kept_s)
end
return {id, at}
