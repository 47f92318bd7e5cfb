// A hundred thousand samples, chosen and drawn anew for each frame: numbers in, numbers out. What stays the same between two frames is
// made once (bins, places, order), so that a frame is a few plain loops.

import type { Point } from './maths'

const BANDS = 128

/** A test of whether points lie in a polygon (even-odd), for many points: it looks only at edges at the height of the point. */
export function insideOf(polygon: Point[]): (x: number, y: number) => boolean {
  let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity]
  for (const [x, y] of polygon) {
    left = Math.min(left, x)
    right = Math.max(right, x)
    low = Math.min(low, y)
    high = Math.max(high, y)
  }
  const tall = (high - low) / BANDS || 1
  const bandOf = (y: number) => Math.min(BANDS - 1, Math.max(0, Math.floor((y - low) / tall)))
  const bands: number[][] = Array.from({ length: BANDS }, () => [])
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [yi, yj] = [polygon[i][1], polygon[j][1]]
    if (yi === yj) continue
    for (let band = bandOf(Math.min(yi, yj)); band <= bandOf(Math.max(yi, yj)); band++)
      bands[band].push(polygon[i][0], yi, polygon[j][0], yj)
  }
  return (x, y) => {
    if (!(x >= left && x <= right && y >= low && y <= high)) return false
    const edges = bands[bandOf(y)]
    let found = false
    for (let at = 0; at < edges.length; at += 4) {
      const yi = edges[at + 1]
      const yj = edges[at + 3]
      if (yi > y !== yj > y && x < ((edges[at + 2] - edges[at]) * (y - yi)) / (yj - yi) + edges[at]) found = !found
    }
    return found
  }
}

/** The bin of each value, between `low` and `high` in `bins` equal parts; what lies outside counts at the edge. -1: not finite. */
export function binsOf(values: ArrayLike<number>, low: number, high: number, bins: number): Int16Array {
  const found = new Int16Array(values.length)
  const scale = high > low ? bins / (high - low) : 0
  for (let i = 0; i < values.length; i++) {
    const v = values[i]
    found[i] = Number.isFinite(v) ? Math.min(bins - 1, Math.max(0, Math.floor((v - low) * scale))) : -1
  }
  return found
}

/** How many samples are in each bin, of all or of those in `mask`. */
export function counted(places: Int16Array, bins: number, mask: Uint8Array | null): Uint32Array {
  const counts = new Uint32Array(bins)
  for (let i = 0; i < places.length; i++) if (places[i] >= 0 && (mask === null || mask[i])) counts[places[i]]++
  return counts
}

/** Indices in the order of their values; what is no number comes last, and equal ones in their own order. */
export function orderOf(values: ArrayLike<number>, down: boolean): Uint32Array {
  const order = Uint32Array.from({ length: values.length }, (_, i) => i)
  const sign = down ? -1 : 1
  return order.sort((a, b) => {
    const [x, y] = [values[a], values[b]]
    if (x !== x || y !== y) return (x !== x ? 1 : 0) - (y !== y ? 1 : 0) || a - b
    return (x - y) * sign || a - b
  })
}

/** Those of an order that are in `mask`. */
export function among(order: Uint32Array, mask: Uint8Array | null): number[] {
  const found: number[] = []
  for (let k = 0; k < order.length; k++) if (mask === null || mask[order[k]]) found.push(order[k])
  return found
}

/** A mask of `size` samples with those at `indices` in it. */
export function maskOf(indices: ArrayLike<number>, size: number): Uint8Array {
  const found = new Uint8Array(size)
  for (let k = 0; k < indices.length; k++) if (indices[k] < size) found[indices[k]] = 1
  return found
}

/** Where points are on a picture of `width` pixels: the number of their pixel, or -1. */
export function placed(
  xs: ArrayLike<number>,
  ys: ArrayLike<number>,
  toX: { scale: number; shift: number },
  toY: { scale: number; shift: number },
  width: number,
  height: number,
): Int32Array {
  const found = new Int32Array(xs.length)
  for (let i = 0; i < xs.length; i++) {
    const x = Math.round(xs[i] * toX.scale + toX.shift)
    const y = Math.round(ys[i] * toY.scale + toY.shift)
    found[i] = x >= 0 && x < width && y >= 0 && y < height ? y * width + x : -1
  }
  return found
}

/** A round spot as shifts of a pixel's number, each with how much of that pixel it covers (0 to 1). */
export function spot(radius: number, width: number): { shifts: number[]; cover: number[] } {
  const [shifts, cover]: [number[], number[]] = [[], []]
  const reach = Math.ceil(radius)
  for (let dy = -reach; dy <= reach; dy++)
    for (let dx = -reach; dx <= reach; dx++) {
      const share = Math.min(1, Math.max(0, radius + 0.5 - Math.hypot(dx, dy)))
      if (share > 0) {
        shifts.push(dy * width + dx)
        cover.push(share)
      }
    }
  return { shifts, cover }
}

/** Adds spots to a picture of pixels (0xAABBGGRR), of all points or of those in `mask`: the last colour wins, and they get denser where
 * many are. */
export function dotted(
  picture: Uint32Array,
  places: Int32Array,
  shape: { shifts: number[]; cover: number[] },
  mask: Uint8Array | null,
  colours: Uint32Array,
  alpha: number,
): void {
  const shifts = Int32Array.from(shape.shifts)
  const weights = Int32Array.from(shape.cover, (share) => Math.max(1, Math.round(share * alpha * 255)))
  const [spots, length, end] = [shifts.length, picture.length, places.length]
  for (let i = 0; i < end; i++) {
    const place = places[i]
    if (place < 0 || (mask !== null && mask[i] === 0)) continue
    const ink = colours[i]
    for (let k = 0; k < spots; k++) {
      const at = place + shifts[k]
      if (at < 0 || at >= length) continue
      const dense = (picture[at] >>> 24) + weights[k]
      picture[at] = ((dense > 255 ? 255 : dense) << 24) | ink
    }
  }
}

/** #rrggbb as a pixel without its alpha. */
export function inkOf(colour: string): number {
  const value = parseInt(colour.replace('#', ''), 16)
  return ((value & 0xff) << 16) | (value & 0xff00) | (value >>> 16)
}
