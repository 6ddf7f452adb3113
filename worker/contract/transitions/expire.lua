-- Takes jobs whose pictures' time is up off the list of those that have pictures.
-- ARGV: how many at most. Returns their ids.
local ids = redis.call('ZRANGEBYSCORE', PICTURES, '-inf', decimal(NOW), 'LIMIT', 0, ARGV[1])
if #ids > 0 then redis.call('ZREM', PICTURES, unpack(ids)) end
return ids
