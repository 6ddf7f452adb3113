-- A worker ends in good order; what it still holds goes back.
-- ARGV: worker.
for _, id in ipairs(still_held(redis.call('SMEMBERS', held_key(ARGV[1])))) do put_back(id) end
forget_worker(ARGV[1])
