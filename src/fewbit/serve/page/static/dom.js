// Elements without markup in strings: text stays text, whoever wrote it.

export const byId = (id) => document.getElementById(id);

/** An element; keys of `attributes` that start with "on" are listeners, null ones are left out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const NOTATION = new Intl.NumberFormat("en");
const ONE_DIGIT = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

/** A count or a rate: whole from 100 on, with one digit below. */
export const rate = (value) => (value >= 99.95 ? NOTATION.format(Math.round(value)) : ONE_DIGIT.format(value));

export const count = (value) => NOTATION.format(value);

/** Milliseconds for reading. */
export const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
