// The pure parts: numbers in, numbers out.

/** A glob pattern (`*`, `?`, `[a-z]`, several with commas or blanks between) as a test. What has no wildcard is searched anywhere. */
export function glob(pattern: string): (text: string) => boolean {
  const tests = pattern
    .split(/[\s,]+/)
    .filter(Boolean)
    .map((part) => {
      if (!/[*?[]/.test(part)) return (text: string) => text.toLowerCase().includes(part.toLowerCase())
      const source = part
        .replace(/[.+^${}()|\\]/g, '\\$&')
        .replaceAll('*', '.*')
        .replaceAll('?', '.')
      try {
        const expression = new RegExp(`^${source}$`, 'i')
        return (text: string) => expression.test(text)
      } catch {
        return (text: string) => text === part
      }
    })
  return (text) => tests.length === 0 || tests.some((test) => test(text))
}

/** Exponential moving average, corrected for its beginning; gaps stay gaps. `weight` 0 (none) to 1. */
export function smooth(values: ArrayLike<number>, weight: number): Float64Array {
  const found = new Float64Array(values.length)
  let sum = 0
  let share = 0
  for (let i = 0; i < values.length; i++) {
    const value = values[i]
    if (!Number.isFinite(value)) {
      found[i] = NaN
      continue
    }
    sum = sum * weight + (1 - weight) * value
    share = share * weight + (1 - weight)
    found[i] = weight === 0 ? value : sum / share
  }
  return found
}

export function quantile(sorted: ArrayLike<number>, q: number): number {
  if (sorted.length === 0) return NaN
  const at = q * (sorted.length - 1)
  const low = Math.floor(at)
  const high = Math.ceil(at)
  return sorted[low] + (sorted[high] - sorted[low]) * (at - low)
}

const isNumber = (v: number | null): v is number => v !== null && Number.isFinite(v)

/** The finite values of several lines, sorted; every n-th of them when there are many. */
export function pooled(lines: ArrayLike<number | null>[], most = 8000): Float64Array {
  let total = 0
  for (const line of lines) total += line.length
  const every = Math.max(1, Math.floor(total / most))
  const found: number[] = []
  let place = 0
  for (const line of lines)
    for (let i = 0; i < line.length; i++) {
      const v = line[i]
      if (isNumber(v) && place++ % every === 0) found.push(v)
    }
  return Float64Array.from(found).sort()
}

/** What part of its size an axis must show at least: its marks are counted up from one to the next, and in less there is no next one. */
const NARROWEST = 1e-12

/** Where a y axis begins and ends. `robust`: single wild values do not flatten all the others. Null: nothing to show. */
export function yRange(lines: ArrayLike<number | null>[], robust: boolean, log: boolean): [number, number] | null {
  let low = Infinity
  let high = -Infinity
  let count = 0
  for (const line of lines)
    for (let i = 0; i < line.length; i++) {
      const v = line[i]
      if (!isNumber(v) || (log && v <= 0)) continue
      count++
      if (v < low) low = v
      if (v > high) high = v
    }
  if (count === 0) return null
  if (robust && count >= 20) {
    let values: ArrayLike<number> = pooled(lines)
    if (log) values = Array.from(values).filter((v) => v > 0)
    const q1 = quantile(values, 0.02)
    const q3 = quantile(values, 0.98)
    if (log) {
      const reach = 1.5 * (Math.log(q3) - Math.log(q1))
      low = Math.max(low, Math.exp(Math.log(q1) - reach))
      high = Math.min(high, Math.exp(Math.log(q3) + reach))
    } else {
      const reach = 2 * (q3 - q1)
      if (reach > 0) {
        low = Math.max(low, q1 - reach)
        high = Math.min(high, q3 + reach)
      }
    }
  }
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05]
  const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05
  const least = NARROWEST * Math.max(Math.abs(low), Math.abs(high))
  return [low - Math.max(pad, least), high + Math.max(pad, least)]
}

/** What an x axis shows: what was zoomed to, or all there is. One of logarithms begins at `least` or later; null: it is none. */
export function xRange(
  zoom: [number, number] | null,
  all: [number, number] | null,
  least: number | null,
): [number, number] {
  let [from, to] = zoom ?? all ?? [0, 1]
  if (least !== null) {
    from = Math.max(from, least)
    to = Math.max(to, zoom ? from : 10)
  }
  const narrowest = NARROWEST * Math.max(Math.abs(from), Math.abs(to))
  if (to - from > narrowest) return [from, to]
  if (least !== null) return [from / 2, from * 2]
  const pad = Math.max(1, narrowest)
  return [from - pad, to + pad]
}

export type Point = [number, number]

/** The place in a sorted list that is nearest to `x`. */
export function nearest(xs: ArrayLike<number>, x: number): number {
  let low = 0
  let high = xs.length - 1
  while (high - low > 1) {
    const middle = (low + high) >> 1
    if (xs[middle] < x) low = middle
    else high = middle
  }
  return high >= 0 && Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low
}

/** What somebody typed into a field, as the value that he means: a number, true, false, null, a list, or a text. */
export function typed(text: string): unknown {
  const trimmed = text.trim()
  if (trimmed === '') return ''
  if (/^(true|false|null)$/.test(trimmed) || /^[[{]/.test(trimmed)) {
    try {
      return JSON.parse(trimmed)
    } catch {
      return trimmed
    }
  }
  const value = Number(trimmed)
  return Number.isNaN(value) ? trimmed : value
}

/** How well `query` fits `text`, letters in order; null: not at all. Less is better. */
export function fuzzy(query: string, text: string): number | null {
  const wanted = query.toLowerCase()
  const there = text.toLowerCase()
  const found = there.indexOf(wanted)
  if (found >= 0) return found
  let at = 0
  let cost = 100
  for (const letter of wanted) {
    if (letter === ' ') continue
    const next = there.indexOf(letter, at)
    if (next < 0) return null
    cost += next - at
    at = next + 1
  }
  return cost
}

/** Round values between two ends, about so many. */
export function ticks(low: number, high: number, about = 5): number[] {
  const rough = (high - low) / about
  if (!(rough > 0)) return [low]
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) ?? rough
  const found: number[] = []
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(12))
  return found
}

/** `lr<0.01`, `step>=100`, `kind=fork`: a name, a sign and a value, as a test of what has names; null for text of another form. */
export function condition(text: string): ((value: (name: string) => unknown) => boolean) | null {
  const found = /^([^<>=\s]+)(<=|>=|<|>|=)([^<>=\s]+)$/.exec(text.trim())
  if (!found) return null
  const [, name, sign, wanted] = found
  const limit = Number(wanted)
  return (value) => {
    const own = value(name)
    if (typeof own !== 'number' || !Number.isFinite(limit)) return sign === '=' && String(own) === wanted
    return { '<': own < limit, '>': own > limit, '<=': own <= limit, '>=': own >= limit, '=': own === limit }[sign]!
  }
}
