// Markdown into DOM nodes: what language models write, not all of CommonMark.
// It does not know HTML: tags in the text are text. Nothing is loaded from outside: images become links.
// Blocks are cut line by line and inline text is read once from left to right, so time is linear in its length
// (a search that failed is not made again), and a growing text renders its last block anew, not all of it.

import { copyButton, element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8;
const SAFE_LINK = /^(?:https?:\/\/|mailto:)/i;
const LINK = /^\[([^[\]]*)\]\(\s*([^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s[^()]*)?\)/;
const MAX_LINK = 2000; // characters
const BARE_LINK = /https?:\/\/[^\s<>"'`]+/y;

/** Shows a text that may grow: blocks that have not changed keep their nodes. */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.blocks = [];
  }

  show(text) {
    const blocks = splitBlocks(text.split("\n"));
    let same = 0;
    while (same < blocks.length && blocks[same] === this.blocks[same]) same++;
    while (this.container.childNodes.length > same) this.container.lastChild.remove();
    this.container.append(...blocks.slice(same).map((block) => renderBlock(block.split("\n"), 0)));
    this.blocks = blocks;
  }
}

/** The top-level blocks of `lines`, each a string. */
function splitBlocks(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const end = endOfBlock(lines, i);
    blocks.push(lines.slice(i, end).join("\n"));
    i = end;
  }
  return blocks;
}

function endOfBlock(lines, start) {
  const line = lines[start];
  const fence = FENCE.exec(line);
  let i = start + 1;
  if (fence) {
    while (i < lines.length && !closes(lines[i], fence[1])) i++;
    return Math.min(i + 1, lines.length);
  }
  if (HEADING.test(line) || RULE.test(line)) return i;
  if (QUOTE.test(line)) {
    while (i < lines.length && QUOTE.test(lines[i])) i++;
    return i;
  }
  if (ITEM.test(line)) return endOfList(lines, start);
  if (isTable(lines, start)) {
    while (i < lines.length && lines[i].includes("|")) i++;
    return i;
  }
  while (i < lines.length && lines[i].trim() && !interrupts(lines, i)) i++;
  return i;
}

function endOfList(lines, start) {
  const indent = ITEM.exec(lines[start])[1].length;
  let end = start + 1;
  let blank = false;
  let fence = null;
  for (let i = end; i < lines.length; i++) {
    const line = lines[i];
    if (fence) {
      if (closes(line, fence)) fence = null;
    } else if (!line.trim()) {
      blank = true;
      continue;
    } else {
      const deeper = line.search(/\S/) > indent;
      if (!deeper && !ITEM.test(line) && (blank || interrupts(lines, i))) break;
      if (!deeper && RULE.test(line)) break;
      fence = FENCE.exec(line)?.[1] ?? null;
    }
    blank = false;
    end = i + 1;
  }
  return end;
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

function isTable(lines, i) {
  return lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && TABLE_RULE.test(lines[i + 1]);
}

/** Whether a paragraph ends before this line. */
function interrupts(lines, i) {
  const line = lines[i];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) || isTable(lines, i);
}

function renderBlock(lines, depth) {
  const first = lines[0];
  if (depth > MAX_DEPTH) return element("p", {}, lines.join("\n"));
  const fence = FENCE.exec(first);
  if (fence) return renderCode(lines, fence);
  const heading = HEADING.exec(first);
  if (heading) return element(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])); // h1, h2: the page's
  if (RULE.test(first)) return element("hr");
  if (QUOTE.test(first)) {
    const inside = lines.map((line) => line.replace(/^ {0,3}> ?/, ""));
    return element("blockquote", {}, ...renderBlocks(inside, depth + 1));
  }
  if (ITEM.test(first)) return renderList(lines, depth);
  if (isTable(lines, 0)) return renderTable(lines);
  return element("p", {}, ...inline(lines.map((line) => line.trim()).join("\n")));
}

function renderBlocks(lines, depth) {
  return splitBlocks(lines).map((block) => renderBlock(block.split("\n"), depth));
}

function renderCode(lines, fence) {
  const isClosed = lines.length > 1 && closes(lines.at(-1), fence[1]);
  const indent = first(/^ */, lines[0]).length;
  const code = lines
    .slice(1, isClosed ? -1 : undefined)
    .map((line) => line.slice(Math.min(indent, first(/^ */, line).length)))
    .join("\n");
  const caption = element("figcaption", {}, element("span", {}, fence[2] || "text"));
  const copy = copyButton(() => code);
  if (copy) caption.append(copy);
  return element("figure", { className: "code" }, caption, element("pre", { tabIndex: 0 }, element("code", {}, code)));
}

function first(pattern, text) {
  return pattern.exec(text)[0];
}

function renderList(lines, depth) {
  const [, , marker] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(marker);
  const list = element(ordered ? "ol" : "ul");
  if (ordered) list.start = parseInt(marker, 10);
  const indent = ITEM.exec(lines[0])[1].length;
  let item = [];
  let width = 0;
  const flush = () => {
    if (!item.length) return;
    const blocks = renderBlocks(item, depth + 1);
    const made = element("li");
    for (const block of blocks) made.append(...(block.tagName === "P" && !item.includes("") ? [...block.childNodes] : [block]));
    list.append(made);
  };
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent + 1) {
      flush();
      width = found[0].length;
      item = [line.slice(width)];
    } else {
      item.push(line.slice(Math.min(width, first(/^\s*/, line).length)));
    }
  }
  flush();
  return list;
}

function renderTable(lines) {
  const [head, rule, ...rows] = lines.map(cellsOf);
  const align = rule.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (tag, cells) =>
    element("tr", {}, ...head.map((_, i) => element(tag, { className: align[i] ?? "left" }, ...inline(cells[i] ?? ""))));
  const table = element(
    "table",
    {},
    element("thead", {}, row("th", head)),
    element("tbody", {}, ...rows.map((cells) => row("td", cells))),
  );
  return element("div", { className: "table", tabIndex: 0 }, table);
}

function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (cells.length > 1 && !cells.at(-1).trim()) cells.pop();
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** Inline text as nodes and strings. */
function inline(text, depth = 0) {
  const nodes = [];
  const missing = new Set(); // delimiters that close nowhere after here
  let plain = "";
  let bare;
  let i = 0;
  const push = (node, end) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
    i = end;
  };
  while (i < text.length) {
    const char = text[i];
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else if (char === "`") {
      const ticks = runOf(text, i);
      const end = missing.has(ticks) ? -1 : closingTicks(text, i + ticks.length, ticks);
      if (end >= 0) {
        push(element("code", {}, text.slice(i + ticks.length, end).replace(/^ (.*[^ ].*) $/s, "$1")), end + ticks.length);
      } else {
        missing.add(ticks);
        plain += ticks;
        i += ticks.length;
      }
    } else if ((char === "*" || char === "_" || char === "~") && depth < MAX_DEPTH) {
      const mark = text.startsWith(char + char, i) ? char + char : char;
      const end = mark === "~" || missing.has(mark) ? -1 : closingMark(text, i, mark);
      if (end >= 0) {
        const tag = char === "~" ? "del" : mark.length === 2 ? "strong" : "em";
        push(element(tag, {}, ...inline(text.slice(i + mark.length, end), depth + 1)), end + mark.length);
      } else {
        if (end === NO_CLOSER) missing.add(mark);
        plain += mark;
        i += mark.length;
      }
    } else if (char === "[" || (char === "!" && text[i + 1] === "[")) {
      const found = linkAt(text, i + (char === "!" ? 1 : 0));
      if (found) {
        push(link(found.url, depth < MAX_DEPTH ? inline(found.label, depth + 1) : [found.label]), found.end);
      } else {
        plain += char;
        i++;
      }
    } else if (char === "h" && !/\w/.test(text[i - 1] ?? "") && (bare = bareLinkAt(text, i))) {
      push(link(bare, [bare]), i + bare.length);
    } else {
      plain += char;
      i++;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

const NO_CLOSER = -1;
const NO_OPENER = -2;

function runOf(text, start) {
  let end = start;
  while (text[end] === text[start]) end++;
  return text.slice(start, end);
}

function closingTicks(text, from, ticks) {
  for (let i = text.indexOf(ticks, from); i >= 0; i = text.indexOf(ticks, i)) {
    const run = runOf(text, i);
    if (run.length === ticks.length) return i;
    i += run.length;
  }
  return -1;
}

/** Where the emphasis that may open at `start` closes. */
function closingMark(text, start, mark) {
  const from = start + mark.length;
  const isWord = (char) => char !== undefined && /[\p{L}\p{N}]/u.test(char);
  if (!text[from] || /\s/.test(text[from])) return NO_OPENER;
  if (mark[0] === "_" && isWord(text[start - 1])) return NO_OPENER; // snake_case
  for (let i = text.indexOf(mark, from + 1); i >= 0; i = text.indexOf(mark, i + mark.length)) {
    const run = runOf(text, i).length;
    if (mark.length === 1 && run === 2) {
      i++; // ** inside *…*
      continue;
    }
    const end = run > mark.length ? i + run - mark.length : i;
    if (!/\s/.test(text[i - 1]) && !(mark[0] === "_" && isWord(text[end + mark.length]))) return end;
  }
  return NO_CLOSER;
}

function linkAt(text, start) {
  const found = LINK.exec(text.slice(start, start + MAX_LINK));
  return found && SAFE_LINK.test(found[2]) ? { label: found[1], url: found[2], end: start + found[0].length } : null;
}

function bareLinkAt(text, start) {
  BARE_LINK.lastIndex = start;
  return BARE_LINK.exec(text)?.[0].replace(/[.,;:!?*_)\]]+$/, "");
}

function link(url, children) {
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
