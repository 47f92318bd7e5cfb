// Numbers and times as people read them.

/** Few digits, never a jumping width: 0.0123, 1.234, 12.34, 1.2e-5. */
export function number(value: unknown, digits = 4): string {
  if (value === null || value === undefined) return '–'
  if (typeof value !== 'number') return String(value)
  if (!Number.isFinite(value)) return Number.isNaN(value) ? 'NaN' : value > 0 ? '∞' : '−∞'
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return grouped(value)
  const size = Math.abs(value)
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace('e+', 'e').replace('-', '−')
  return value.toPrecision(digits).replace('-', '−')
}

export function grouped(value: number): string {
  return (value || 0).toLocaleString('en-US').replaceAll(',', ' ') // zero has a sign of its own
}

export function bytes(value: number | null | undefined): string {
  if (value === null || value === undefined) return '–'
  const units = ['B', 'kB', 'MB', 'GB', 'TB']
  let n = value
  let unit = 0
  while (n >= 1000 && unit < units.length - 1) {
    n /= 1000
    unit += 1
  }
  return `${unit === 0 ? n : n.toPrecision(3)} ${units[unit]}`
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return '–'
  const s = Math.max(0, Math.round(seconds))
  if (s < 60) return `${s} s`
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, '0')} s`
  if (s < 86400) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, '0')} min`
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`
}

export function ago(time: number, now: number): string {
  const s = now - time
  if (s < 5) return 'just now'
  if (s < 60) return `${Math.floor(s)} s ago`
  if (s < 3600) return `${Math.floor(s / 60)} min ago`
  if (s < 86400) return `${Math.floor(s / 3600)} h ago`
  return new Date(time * 1000).toLocaleDateString('en-CA')
}

export function clock(time: number): string {
  return new Date(time * 1000).toLocaleTimeString('en-GB')
}

export function stamp(time: number): string {
  const date = new Date(time * 1000)
  return `${date.toLocaleDateString('en-CA')} ${date.toLocaleTimeString('en-GB')}`
}

export const short = (hash: string): string => hash.slice(0, 10)

/** A value from JSON in one line. */
export function plain(value: unknown): string {
  if (typeof value === 'number') return number(value)
  if (typeof value === 'string') return value
  if (value === null || value === undefined) return '–'
  return JSON.stringify(value)
}
