-- A worker gives jobs back unfinished, for another to run from the start.
-- ARGV: 'id:execution' of each.
for _, id in ipairs(still_held(ARGV)) do put_back(id) end
