"""The scripts that Redis runs, each as one step, to count what several gateways send to an upstream.

KEYS: `sent`, a sorted set of requests by the time in milliseconds from which on they count; `amounts`, the tokens of
each; `state`, with the sum of tokens, the gateways that have joined, and the time from which on requests are granted.
"""

from collections.abc import Mapping

_COMMON = """
local sent, amounts, state = KEYS[1], KEYS[2], KEYS[3]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function forget(member)
  local tokens = redis.call('HGET', amounts, member)
  if redis.call('ZREM', sent, member) == 1 and tokens then redis.call('HINCRBYFLOAT', state, 'tokens', -tokens) end
  redis.call('HDEL', amounts, member)
end
local function remember(member, at, tokens)
  if redis.call('ZADD', sent, 'NX', at, member) == 1 then
    redis.call('HSET', amounts, member, tokens)
    redis.call('HINCRBYFLOAT', state, 'tokens', tokens)
  end
end
"""
# ARGV: the gateway, how many there are, the window, time for which a request is reserved that is not sent. Then, of
# each request of this gateway, its member, its age (-1 if it is not sent) and its tokens. Where nothing is known of an
# upstream, nothing is sent before all gateways have joined, or the window has passed.
_JOIN = """
local length = tonumber(ARGV[3])
if redis.call('HEXISTS', state, 'ready_at') == 0 then
  redis.call('DEL', sent, amounts, state)
  redis.call('HSET', state, 'ready_at', now + length, 'tokens', 0, 'joined', 0)
end
if redis.call('HSETNX', state, 'gateway ' .. ARGV[1], 1) == 1 then redis.call('HINCRBY', state, 'joined', 1) end
if tonumber(redis.call('HGET', state, 'joined')) >= tonumber(ARGV[2]) then redis.call('HSET', state, 'ready_at', 0) end
for index = 5, #ARGV, 3 do
  local age = tonumber(ARGV[index + 1])
  local at = age < 0 and now + tonumber(ARGV[4]) or now - age
  remember(ARGV[index], at, ARGV[index + 2])
  redis.call('ZADD', sent, 'XX', at, ARGV[index])
end
"""
# ARGV: member, tokens, limit of requests, limit of tokens (-1: none), window, time for which it is reserved.
# Returns -1 if nothing is known of the upstream, 0 if the request may be sent, or else the milliseconds to wait.
_TAKE = """
if redis.call('HEXISTS', state, 'ready_at') == 0 then return -1 end
local ready_at = tonumber(redis.call('HGET', state, 'ready_at'))
if now < ready_at then return ready_at - now end
local member, tokens, length = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[5])
local limit, most = math.max(tonumber(ARGV[3]), 1), tonumber(ARGV[4])
for _, old in ipairs(redis.call('ZRANGEBYSCORE', sent, '-inf', now - length)) do forget(old) end
local count, wait = redis.call('ZCARD', sent), 0
if count == 0 then redis.call('HSET', state, 'tokens', 0) end
local function wait_for(index)
  local found = redis.call('ZRANGE', sent, index, index, 'WITHSCORES')
  wait = math.max(wait, 1, found[2] + length - now)
end
if count + 1 > limit then wait_for(count - limit) end
local excess = most < 0 and 0 or tonumber(redis.call('HGET', state, 'tokens')) + tokens - math.max(most, tokens)
if excess > 0.001 then
  local members = redis.call('ZRANGE', sent, 0, -1)
  for index, each in ipairs(members) do
    excess = excess - (redis.call('HGET', amounts, each) or 0)
    if excess <= 0.001 or index == #members then wait_for(index - 1) break end
  end
end
if wait > 0 then return math.ceil(wait) end
remember(member, now + tonumber(ARGV[6]), tokens)
return 0
"""
# ARGV: member, time for which it is reserved, tokens. It is sent whether it fits or not.
_ADD = "remember(ARGV[1], now + tonumber(ARGV[2]), ARGV[3])"
# ARGV: member, its age.
_MARK = "redis.call('ZADD', sent, 'XX', now - tonumber(ARGV[2]), ARGV[1])"
_CANCEL = "forget(ARGV[1])"
# ARGV: member, tokens.
_CORRECT = """
local before = redis.call('HGET', amounts, ARGV[1])
if before then
  redis.call('HSET', amounts, ARGV[1], ARGV[2])
  redis.call('HINCRBYFLOAT', state, 'tokens', ARGV[2] - before)
end
"""
# ARGV: how long all is kept. Returns 0 if nothing is known of the upstream.
_KEEP = """
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[1]) end
return redis.call('HEXISTS', state, 'ready_at')
"""
_TEXTS = {
    "join": _JOIN,
    "take": _TAKE,
    "add": _ADD,
    "mark": _MARK,
    "cancel": _CANCEL,
    "correct": _CORRECT,
    "keep": _KEEP,
}
SCRIPTS: Mapping[str, str] = {name: _COMMON + text for name, text in _TEXTS.items()}
