// Reads what a test gives on standard input with the page's own parser; answers with JSON.
import { text } from "node:stream/consumers";

const { parser, bodies, types } = JSON.parse(await text(process.stdin));
const { Parser, isEventStream } = await import(parser);

const read = (pieces) => {
  const reader = new Parser();
  const blocks = pieces.flatMap((piece) => reader.push(Buffer.from(piece, "base64")));
  return { blocks, retry: reader.retry };
};
console.log(JSON.stringify({ read: bodies.map(read), types: types.map(isEventStream) }));
