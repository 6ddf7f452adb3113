-- Notes that a worker lives and which models it holds, by Redis' own clock.
-- ARGV: members of darkroom:workers, each the JSON of [model, worker].
redis.call('ZREMRANGEBYSCORE', 'darkroom:workers', '-inf', decimal(NOW - 60))
for _, member in ipairs(ARGV) do redis.call('ZADD', 'darkroom:workers', decimal(NOW), member) end
