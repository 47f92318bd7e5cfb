// In which order charts stand: pinned ones first, then as somebody put them, then the others as they are usually.

export interface Arrangement {
  pins: string[]
  /** Names from first to last. It may lack some, and have some that are not there. */
  order: string[]
}

export function arranged(names: string[], { pins, order }: Arrangement): string[] {
  const places = new Map(order.map((name, place) => [name, place]))
  const rank = (name: string) => (pins.includes(name) ? 0 : order.length + 1) + (places.get(name) ?? order.length)
  return [...names].sort((a, b) => rank(a) - rank(b))
}

/** One is put where another stands, which gives way. Among pinned ones it is pinned, too, and elsewhere it is not. */
export function moved(names: string[], { pins, order }: Arrangement, name: string, target: string): Arrangement {
  const all = arranged(names, { pins, order })
  const from = all.indexOf(name)
  const to = all.indexOf(target)
  if (from < 0 || to < 0 || from === to) return { pins, order }
  all.splice(from, 1)
  all.splice(to, 0, name)
  const others = pins.filter((one) => one !== name)
  return { pins: pins.includes(target) ? [...others, name] : others, order: all }
}

/** Which one of its group (the pinned ones, or the others) a chart takes the place of when a key is pressed. */
export function aim(shown: string[], pins: string[], name: string, key: string): string | null {
  const group = shown.filter((one) => pins.includes(one) === pins.includes(name))
  const at = group.indexOf(name)
  const to: Record<string, number> = {
    ArrowLeft: at - 1,
    ArrowUp: at - 1,
    ArrowRight: at + 1,
    ArrowDown: at + 1,
    Home: 0,
    End: group.length - 1,
  }
  const found = key in to ? group[to[key]] : undefined
  return found === undefined || found === name ? null : found
}
