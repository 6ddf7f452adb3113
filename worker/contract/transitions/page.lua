-- An owner's jobs, newest first.
-- ARGV: owner, how many at most, id that all are older than or ''. Returns their records, as `record` gives them.
local owner, limit, before = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local reply, top = {}, before == '' and '+' or '(' .. before
while #reply < limit do
  local ids = redis.call('ZRANGE', owner_key(owner), top, '-', 'BYLEX', 'REV', 'LIMIT', 0, limit)
  if #ids == 0 then break end
  for _, id in ipairs(ids) do
    local found = record(id)
    if found then reply[#reply + 1] = found else redis.call('ZREM', owner_key(owner), id) end  -- its time was up
    if #reply == limit then break end
  end
  top = '(' .. ids[#ids]
end
return reply
