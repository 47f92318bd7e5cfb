// The hub's binary form: see docs/api.md, "Columns".

export type Column = Float64Array | Float32Array | Int32Array | Uint8Array | string[]

interface Head {
  columns: { name: string; type: string; offset: number; length: number; width: number; bytes?: number }[]
  meta: Record<string, unknown>
}

const TYPES = { f8: Float64Array, f4: Float32Array, i4: Int32Array, u1: Uint8Array } as const

export interface Columns {
  get(name: string): Column | undefined
  names: string[]
  meta: Record<string, unknown>
}

/** Arrays are views of `buffer`, without a copy; a column is read when it is asked for. */
export function unpack(buffer: ArrayBuffer): Columns {
  const view = new DataView(buffer)
  if (buffer.byteLength < 8 || view.getUint32(0, false) !== 0x4f544631) throw new Error('these are no columns')
  const size = view.getUint32(4, true)
  const head: Head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)))
  const places = new Map(head.columns.map((column) => [column.name, column]))
  return {
    names: [...places.keys()],
    meta: head.meta,
    get(name) {
      const c = places.get(name)
      if (c === undefined) return undefined
      if (c.type === 'json')
        return JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8 + size + c.offset, c.bytes))) as string[]
      const Type = TYPES[c.type as keyof typeof TYPES]
      if (Type === undefined) throw new Error(`a column of type ${c.type}`)
      return new Type(buffer, 8 + size + c.offset, c.length * c.width)
    },
  }
}

/** A column of numbers, or undefined. */
export function numbers(columns: Columns, name: string): Exclude<Column, string[]> | undefined {
  const found = columns.get(name)
  return found === undefined || Array.isArray(found) ? undefined : found
}
