-- ARGV: id. Returns the job's record, after ending it if it is past its deadline.
return record(ARGV[1])
