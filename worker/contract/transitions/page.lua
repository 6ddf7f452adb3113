-- An owner's jobs, newest first.
-- ARGV: owner, how many at most, id that all are older than or ''.
-- Returns their records, as `record` gives them, and where to go on if it passed over too many that are gone, else ''.
local owner, limit, before = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local MOST_GONE = 2000
local reply, gone, top = {}, 0, before == '' and '+' or '(' .. before
while #reply < limit and gone < MOST_GONE do
  local ids = redis.call('ZRANGE', owner_key(owner), top, '-', 'BYLEX', 'REV', 'LIMIT', 0, limit)
  if #ids == 0 then break end
  for _, id in ipairs(ids) do
    local found = record(id)
    if found then
      reply[#reply + 1] = found
    else  -- its time was up
      redis.call('ZREM', owner_key(owner), id)
      gone = gone + 1
    end
    top = '(' .. id
    if #reply == limit then break end
  end
end
return {reply, gone >= MOST_GONE and string.sub(top, 2) or ''}
