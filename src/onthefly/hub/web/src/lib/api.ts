import type { Checkpoint, Command } from './types'
import { unpack, type Columns } from './columns'

const ROOT = '/api/v1'

export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly type: string,
    message: string,
  ) {
    super(message)
  }
}

async function answered(path: string, init?: RequestInit): Promise<Response> {
  let response: Response
  try {
    response = await fetch(ROOT + path, init)
  } catch {
    throw new ApiError(0, 'Unreachable', 'the hub does not answer')
  }
  if (!response.ok) {
    let type = 'HTTPError'
    let message = `${response.status} ${response.statusText}`
    try {
      const body = await response.json()
      type = body.error.type
      message = body.error.message
    } catch {
      // it is no JSON of ours
    }
    throw new ApiError(response.status, type, message)
  }
  return response
}

export async function get<T>(path: string): Promise<T> {
  return (await answered(path)).json()
}

export async function send<T>(method: string, path: string, body?: unknown): Promise<T> {
  const init: RequestInit = { method }
  if (body !== undefined) {
    init.body = JSON.stringify(body)
    init.headers = { 'content-type': 'application/json' }
  }
  return (await answered(path, init)).json()
}

export async function columns(path: string, body?: unknown): Promise<Columns> {
  const init: RequestInit | undefined =
    body === undefined
      ? undefined
      : { method: 'POST', body: JSON.stringify(body), headers: { 'content-type': 'application/json' } }
  return unpack(await (await answered(path, init)).arrayBuffer())
}

export const inStore = (store: string, path: string): string => `/stores/${store}${path}`

export const fileOf = (store: string, checkpoint: Checkpoint): string =>
  `${ROOT}${inStore(store, `/checkpoints/${checkpoint.id}/file`)}`

export const csvOf = (store: string, runs: string[], names: string[]): string => {
  const query = new URLSearchParams()
  for (const run of runs) query.append('run', run)
  for (const name of names) query.append('name', name)
  return `${ROOT}${inStore(store, `/series.csv?${query}`)}`
}

const pause = (seconds: number) => new Promise((done) => setTimeout(done, seconds * 1000))

/** Queue a command, and wait until it is answered. The key makes it safe to say it again when the hub was gone meanwhile. */
export async function commanded(
  store: string,
  path: string,
  body: unknown,
  onQueued: (command: Command) => void,
): Promise<Command> {
  const key = crypto.randomUUID()
  for (let tries = 0; ; tries++) {
    try {
      let command = await send<Command>('POST', inStore(store, `${path}?wait=5&key=${key}`), body)
      onQueued(command)
      while (command.status === 'queued') {
        await pause(0.4)
        try {
          command = await get<Command>(inStore(store, `/commands/${key}`))
        } catch (error) {
          if (!(error instanceof ApiError) || error.status !== 0) throw error
        }
      }
      return command
    } catch (error) {
      const again = error instanceof ApiError && [0, 429, 503].includes(error.status)
      if (!again || tries > 20) throw error
      await pause(Math.min(1, 0.2 * 2 ** tries))
    }
  }
}
