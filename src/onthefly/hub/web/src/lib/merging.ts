// Strategies of merging: what the hub says of them, and whether what was typed fits.

export interface MergeOption {
  name: string
  kind: 'number' | 'whole number' | 'yes or no' | 'numbers'
  default: unknown
  help: string
  low: number | null
  high: number | null
  open_low: boolean
}

export interface Strategy {
  name: string
  summary: string
  needs: string[]
  options: MergeOption[]
  takes_weights: boolean
  parents: number | null
}

/** An option, with the strategies that have it, and what it is for each by default. */
export interface SharedOption extends MergeOption {
  of: string[]
  usual: string
}

export type Read = { value: unknown } | { problem: string } | null

const shown = (value: unknown): string =>
  value === true ? 'yes' : value === false ? 'no' : Array.isArray(value) ? value.join(', ') || 'none' : String(value)

/** The options of these strategies, each name once: the session gives a value to all that have it. */
export function sharedOptions(strategies: Strategy[]): SharedOption[] {
  const found = new Map<string, { option: MergeOption; of: Map<string, string[]> }>()
  for (const strategy of strategies)
    for (const option of strategy.options) {
      const one = found.get(option.name) ?? { option, of: new Map() }
      const usual = shown(option.default)
      one.of.set(usual, [...(one.of.get(usual) ?? []), strategy.name])
      found.set(option.name, one)
    }
  return [...found.values()].map(({ option, of }) => ({
    ...option,
    of: [...of.values()].flat(),
    usual:
      of.size === 1 ? [...of.keys()][0] : [...of].map(([usual, names]) => `${names.join(', ')} ${usual}`).join('; '),
  }))
}

/** What was typed for an option; null for nothing, which leaves the default. */
export function readOption(option: MergeOption, text: string): Read {
  if (text.trim() === '') return null
  if (option.kind === 'yes or no') return { value: text === 'yes' }
  const words = option.kind === 'numbers' ? text.split(/[\s,]+/).filter(Boolean) : [text.trim()]
  const numbers = words.map(Number)
  if (!numbers.every(Number.isFinite))
    return { problem: option.kind === 'numbers' ? 'numbers, with commas between' : `a ${option.kind}` }
  if (option.kind === 'whole number' && !numbers.every(Number.isInteger)) return { problem: 'a whole number' }
  const { low, high, open_low } = option
  for (const one of numbers) {
    if (low !== null && (open_low ? one <= low : one < low))
      return { problem: `${open_low ? 'above' : 'at least'} ${low}` }
    if (high !== null && one > high) return { problem: `at most ${high}` }
  }
  return { value: option.kind === 'numbers' ? numbers : numbers[0] }
}

/** Why a strategy cannot be used, if it cannot. */
export function misfit(strategy: Strategy, parents: number, weighed: boolean, based: boolean): string | null {
  if (strategy.parents !== null && parents >= 2 && parents !== strategy.parents)
    return `merges ${strategy.parents} parents`
  if (strategy.needs.includes('weights') && !weighed) return 'needs weights: weigh the parents'
  if (strategy.needs.includes('base') && parents >= 2 && !based) return 'needs a base: choose one below'
  return null
}

/** Lines of `name = choice`; null when one is none, or two have one name. */
export function readSlices(text: string): Record<string, string> | null {
  const lines = text.split('\n').filter((line) => line.trim())
  const found = lines.map((line) => /^\s*([^=]*[^=\s])\s*=\s*(\S.*?)\s*$/.exec(line))
  if (found.some((one) => one === null) || new Set(found.map((one) => one![1])).size < found.length) return null
  return Object.fromEntries(found.map((one) => [one![1], one![2]]))
}
