-- Gives the job whose pictures' time has been up the longest to whoever deletes them. Another gets it once the lease has run
-- out and nobody said that they are deleted.
-- ARGV: seconds of the lease. Returns its id and the end of the lease; nil if there is none.
local id = redis.call('ZRANGEBYSCORE', PICTURES, '-inf', decimal(NOW), 'LIMIT', 0, 1)[1]
if not id then return nil end
local lease = decimal(NOW + tonumber(ARGV[1]))
redis.call('ZADD', PICTURES, lease, id)
return {id, lease}
