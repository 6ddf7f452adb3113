-- ARGV: how many jobs past their deadline to end at most. Returns how many it ended.
return end_late(tonumber(ARGV[1]))
