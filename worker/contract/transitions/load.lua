-- How much work there is, and how fast it is done. Reads only.
-- ARGV: seconds after which a silent worker is not counted; then perhaps an owner and a queue.
-- Returns JSON: workers (model, worker, megapixel-steps a second or nothing), speed (by model, as last measured), load (see
-- `weigh`), ahead (how many jobs of the queue go before a new one of the owner). A list without members may be {}.
local workers = {}
for _, member in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, decimal(NOW - tonumber(ARGV[1])), '+inf')) do
  local pair = cjson.decode(member)
  workers[#workers + 1] = {pair[1], pair[2], redis.call('HGET', speeds_key(pair[2]), pair[1])}
end
local function all(key)
  local found, flat = {}, redis.call('HGETALL', key)
  for n = 1, #flat, 2 do found[flat[n]] = tonumber(flat[n + 1]) end
  return found
end
local ahead
if ARGV[2] then ahead = ahead_of(ARGV[3], ARGV[2], redis.call('ZCARD', line_key(ARGV[3], ARGV[2]))) end
return cjson.encode({workers = workers, speed = all(SPEED), load = all(LOAD), ahead = ahead})
