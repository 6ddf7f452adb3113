-- How much work there is, and how fast it is done. Reads only.
-- ARGV: seconds after which a silent worker is not counted; then perhaps an owner and a queue.
-- Returns JSON: what `load_now` gives, and ahead (how many jobs of the queue go before a new one of the owner).
local load = load_now(ARGV[1])
if ARGV[2] then load.ahead = ahead_of(ARGV[3], ARGV[2], redis.call('ZCARD', line_key(ARGV[3], ARGV[2]))) end
return cjson.encode(load)
