"use strict";
// The page's data: an index, and blocks with the texts of samples that are decompressed when they are needed.

const KEPT_BLOCKS = 24;

/** JSON value of base64 of gzipped JSON. */
async function inflate(base64) {
  const stream = new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function bytes(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** Decompressed blocks by number; the least recently used ones are dropped. */
class Blocks {
  constructor() {
    this.elements = [...document.querySelectorAll("script.block")];
    this.kept = new Map();
  }

  get(number) {
    const block = this.kept.get(number) ?? inflate(this.elements[number].textContent);
    this.kept.delete(number);
    this.kept.set(number, block);
    if (this.kept.size > KEPT_BLOCKS) this.kept.delete(this.kept.keys().next().value);
    return block;
  }
}

/** The index with the texts behind it. A sample is a number: its place in the columns of `index.samples`. */
class Data {
  constructor(index) {
    this.index = index;
    this.blocks = new Blocks();
    this.searchable = null;
  }

  get runs() {
    return this.index.runs;
  }

  get samples() {
    return this.index.samples;
  }

  /** Texts, tokens and KLs of a sample, with its prompt. */
  async sample(i) {
    const block = await this.blocks.get(this.samples.block[i]);
    const sample = block.samples[this.samples.at[i]];
    return { ...sample, ...block.prompts[this.samples.prompt[i]] };
  }

  /** Lower-case text of every sample, read block by block; reports progress from 0 to 1. */
  async texts(progress) {
    if (this.searchable) return this.searchable;
    const { block, at, prompt } = this.samples;
    const texts = new Array(block.length).fill("");
    const members = Map.groupBy(block.keys(), (i) => block[i]);
    let done = 0;
    for (const [number, samples] of members) {
      const content = await this.blocks.get(number);
      for (const i of samples) {
        const text = content.prompts[prompt[i]];
        texts[i] = fold(`${content.samples[at[i]].answer}\n${text?.prompt ?? ""}\n${text?.gold ?? ""}`);
      }
      progress(++done / members.size);
    }
    this.searchable = texts;
    return texts;
  }
}
