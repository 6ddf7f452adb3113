-- Takes a job whose pictures are deleted off the list of those that have pictures; but not if its lease is not ours any
-- more: another deletes them too, or a new life of the job has pictures of its own.
-- ARGV: id, end of the lease. Returns 1 if it did, else 0.
local id, lease = ARGV[1], ARGV[2]
if tonumber(redis.call('ZSCORE', PICTURES, id) or 0) ~= tonumber(lease) then return 0 end
return redis.call('ZREM', PICTURES, id)
