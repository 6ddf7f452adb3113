-- Prepended to every transition, after the constants that transitions/__init__.py writes:
-- RQ (key prefix), LEASE_S, LATE_QUEUED, LATE_STARTED, CANCELED, WORKER_LOST (how a job ends that no worker ended).
-- Each transition writes all that RQ's own code would write, so that RQ's tools read our jobs; and it is one script,
-- so that there is no moment with a job in no list. Keys are built here: one primary, not Redis Cluster.

local PRIORITIES = {'high', 'normal', 'low'}
local STARTED_MARGIN_S = 86400  -- RQ's tools take a started job for abandoned this long after its deadline: ours are first
local MAX_EVENTS = 256
local SUSPECTS_S = 8 * 86400
local SUSPECTS_WAIT_S, YIELD_S = 30, 60
local LOST_S, UNTOLD_S = 3600, 3600
local MANY_OWNERS = 32
local LEFTOVERS_S = 600  -- what an execution stored that came to nothing is deleted after so long
local USAGE_S = 91 * 86400
local ROOM, ROOM_KEPT_S = 0.75, 3600  -- beyond this share of Redis' memory records go early, but none that is so young
local CARDS = 'darkroom:cards'  -- model -> its card as JSON, until an operator forgets it
local DEADLINES = 'darkroom:deadlines'  -- id of every job not yet ended, scored by its deadline
local LEASES = 'darkroom:leases'  -- every worker that may hold jobs, scored by the end of its lease
local PAUSED = 'darkroom:paused'  -- models that no worker may claim for
local DRAINING = 'darkroom:draining'  -- models that nothing new is accepted for
local WORKERS = 'darkroom:workers'  -- JSON of [model, worker], scored by when it was last heard of
local OPEN = 'darkroom:open'  -- id of every job not yet ended -> JSON of where it is and what it counts for
local RECORDS = 'darkroom:records'  -- 'queue id' of every ended job that has a record, scored by when it ended
local DROPPED = 'darkroom:dropped'  -- how many records went early
local ENDED = 'darkroom:ended'  -- how many jobs ended how, by model
local LOAD = 'darkroom:load'  -- how many jobs wait and run, and their pixel-steps
local ROUNDS = 'darkroom:rounds'  -- queue -> the last turn taken in it; 'came:<queue>' -> how many owners came
local SPEED = 'darkroom:speed'  -- model -> megapixel-steps a second, as a worker last measured it
local PICTURES = 'darkroom:pictures'  -- ids of jobs that may have pictures, scored by when those are to go
local OUTBOX = 'darkroom:outbox'  -- 'id:event' of what webhooks are to be told, scored by when that is due
local OUTBOX_ENTRIES = 'darkroom:outbox_entries'  -- of the same: JSON of at, attempt, sender

local clock = redis.call('TIME')
local SECONDS, MICROS = tonumber(clock[1]), tonumber(clock[2])
local NOW = SECONDS + MICROS / 1e6

-- Numbers given to Redis need a format: Lua's own keeps 14 digits, a time in microseconds has 16.
local function decimal(t) return string.format('%.6f', t) end

local function integer(n) return string.format('%.0f', n) end

-- Today in UTC; Redis has no os.date, so the Gregorian date is computed (days from 1 March of year 0).
local function today()
  local floor = math.floor
  local shifted = floor(SECONDS / 86400) + 719468
  local era = floor(shifted / 146097)
  local doe = shifted - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
  local mp = floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02d', year, month, doy - floor((153 * mp + 2) / 5) + 1)
end

-- NOW as RQ writes times.
local function iso_now()
  local second = SECONDS % 86400
  return string.format('%sT%02d:%02d:%02d.%06dZ', today(), math.floor(second / 3600), math.floor(second % 3600 / 60),
    second % 60, MICROS)
end

local function job_key(id) return RQ .. 'job:' .. id end
local function list_key(queue) return RQ .. 'queue:' .. queue end
local function events_key(id) return 'darkroom:events:' .. id end
local function held_key(worker) return 'darkroom:held:' .. worker end  -- 'id:execution' of all that it holds
local function suspects_key(group) return 'darkroom:suspects:' .. group end  -- ids that run with nothing beside them
local function yields_key(group) return 'darkroom:yields:' .. group end  -- the worker that takes nothing until it is idle
local function lost_key(worker) return 'darkroom:lost:' .. worker end  -- the one job that it held when its lease lapsed
local function owner_key(owner) return 'darkroom:owner:' .. owner end  -- ids of all its jobs; they sort by time
local function turns_key(queue) return 'darkroom:turns:' .. queue end  -- owners with jobs in it, scored by their turn
local function line_key(queue, owner) return 'darkroom:line:' .. queue .. ':' .. owner end  -- their ids, first come first
local function active_key(owner) return 'darkroom:active:' .. owner end  -- ids of its jobs that have not ended
local function untold_key(id, execution) return 'darkroom:untold:' .. id .. ':' .. execution end
local function idempotency_key(key) return 'darkroom:idempotency:' .. key end
local function speeds_key(worker) return 'darkroom:speeds:' .. worker end  -- model -> megapixel-steps a second
local function watch_key(id) return 'darkroom:watch:' .. id end  -- exists while somebody wants previews
local function preview_key(id) return 'darkroom:preview:' .. id end
local function queue_of(model, priority) return 'darkroom.' .. model .. '.' .. priority end

-- The meta that submit wrote (see RecordWriter), or nil for a job that is not ours.
local function meta_of(id)
  local text = redis.call('HGET', job_key(id), 'meta')
  local ok, meta = pcall(cjson.decode, text or '')
  if ok and type(meta) == 'table' and meta.schema and meta.deadline then return meta end
end

-- Bytes that Redis uses, and those that it may use: 0 where nothing bounds it.
local function memory_now()
  local info = redis.pcall('INFO', 'memory')
  if type(info) ~= 'string' then return 0, 0 end  -- a user of Redis may not be allowed to ask
  local function bytes(field) return tonumber(string.match(info, '\n' .. field .. ':(%d+)') or 0) end
  return bytes('used_memory') - bytes('mem_not_counted_for_evict'), bytes('maxmemory')
end
