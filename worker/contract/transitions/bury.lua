-- A worker's process was seen to die: what it held is taken at once.
-- ARGV: worker, after how many deaths alone a job fails. Returns how many jobs it held.
return bury(ARGV[1], tonumber(ARGV[2]))
