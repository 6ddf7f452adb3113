-- Fair turns: the owners of the jobs in a queue take turns, and each one's jobs are first come, first served.
-- An owner's turn is a number, and the lowest is next. The whole part is the round: after its turn the owner's next one is in
-- the round after, and whoever comes new to the queue is in the round after the last that was taken. So a new owner waits for
-- one job of each of the others, or two, however many those have. The millionths are the order in which owners came.
-- RQ's list holds the same ids for RQ's tools, as they came.

local waiting_memo = {}

-- The owners with jobs in a queue: name, turn, and how many jobs.
local function owners_of(queue)
  if not waiting_memo[queue] then
    local owners, flat = {}, redis.call('ZRANGE', turns_key(queue), 0, -1, 'WITHSCORES')
    for n = 1, #flat, 2 do
      owners[#owners + 1] = {flat[n], tonumber(flat[n + 1]), redis.call('ZCARD', line_key(queue, flat[n]))}
    end
    waiting_memo[queue] = owners
  end
  return waiting_memo[queue]
end

local function last_turn(queue) return tonumber(redis.call('HGET', ROUNDS, queue) or 0) end

-- place: what sorts an owner's jobs. again: it had its turn already, which it gets back.
local function line_up(queue, owner, id, place, again)
  redis.call('ZADD', line_key(queue, owner), place, id)
  local turn = redis.call('ZSCORE', turns_key(queue), owner)
  if not turn then
    local came = redis.call('HINCRBY', ROUNDS, 'came:' .. queue, 1)
    turn = math.floor(last_turn(queue)) + 1 + came % 1e6 / 1e6
  end
  redis.call('ZADD', turns_key(queue), decimal(again and turn - 1 or turn), owner)
  waiting_memo[queue] = nil
end

local function leave_line(queue, owner, id)
  redis.call('ZREM', line_key(queue, owner), id)
  if redis.call('EXISTS', line_key(queue, owner)) == 0 then redis.call('ZREM', turns_key(queue), owner) end
  if redis.call('EXISTS', turns_key(queue)) == 0 then redis.call('HDEL', ROUNDS, queue, 'came:' .. queue) end
  waiting_memo[queue] = nil
end

-- Notes that an owner's job was started, which has left the line.
local function take_turn(queue, owner, turn)
  if redis.call('EXISTS', turns_key(queue)) == 0 then return end
  redis.call('HSET', ROUNDS, queue, decimal(math.max(turn, last_turn(queue))))
  redis.call('ZADD', turns_key(queue), 'XX', decimal(turn + 1), owner)
end

-- How many jobs of a queue go before the one that has `rank` jobs of its owner before it. Where many owners wait, they are
-- not counted one by one: as if each had a long line, but no more than all jobs there are.
local function ahead_of(queue, owner, rank)
  local turn = tonumber(redis.call('ZSCORE', turns_key(queue), owner) or math.floor(last_turn(queue)) + 2)
  local owners = redis.call('ZCARD', turns_key(queue))
  if owners > MANY_OWNERS then
    local others = redis.call('LLEN', list_key(queue)) - redis.call('ZCARD', line_key(queue, owner))
    local sooner = redis.call('ZCOUNT', turns_key(queue), '-inf', '(' .. decimal(turn))
    return rank + math.min(others, sooner + rank * (owners - 1))
  end
  local ahead = rank
  for _, other in ipairs(owners_of(queue)) do
    if other[1] ~= owner then
      ahead = ahead + math.max(0, math.min(other[3], math.ceil(turn + rank - other[2])))
    end
  end
  return ahead
end
