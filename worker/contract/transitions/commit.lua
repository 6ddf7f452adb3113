-- Ends a started job for the execution that holds it; a repeated commit answers as the first did.
-- ARGV: id, execution, status (RQ's finished | failed | canceled), outcome, encoded, when its pictures go or '', milliseconds
-- of the GPU that it took, which count for its owner however it ended.
-- Returns 1, or 0 when the fence fell: no longer ours, or a success that was canceled or came too late.
local id, execution, asked, gpu_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[7])
local f = redis.call('HMGET', job_key(id), 'status', 'execution', 'cancel_requested')
local status, holder, cancel_requested = f[1], f[2], f[3]
tell_gpu_ms(id, execution, gpu_ms)
if holder ~= execution then return 0 end
if status ~= 'started' then
  if status ~= 'queued' and entry_of(id) then cross_out(id) end  -- a tool of RQ's ended it
  return status == asked and 1 or 0
end
if asked == 'finished' then
  if end_if_late(id, status, meta_of(id), gpu_ms) then return 0 end
  if cancel_requested then
    end_job(id, 'canceled', {outcome = CANCELED.outcome, encoded = CANCELED.encoded, gpu_ms = gpu_ms})
    return 0
  end
end
end_job(id, asked, {
  outcome = ARGV[4], encoded = ARGV[5], expires_at = ARGV[6] ~= '' and ARGV[6], gpu_ms = gpu_ms,
})
return 1
