// Reads documents as JSON from standard input, and checks those of cert-manager, KEDA and the Prometheus operator.
// Prints how many there were. The schemas know types, what is required, and values; unknown fields they let pass.
import { readFileSync } from "node:fs";
import { Certificate, Issuer } from "@kubernetes-models/cert-manager/cert-manager.io/v1";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1";
import { PodMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

const kinds = { Certificate, Issuer, PodMonitor, ScaledObject };
let number = 0;
for (const each of JSON.parse(readFileSync(0, "utf8"))) {
  const Kind = kinds[each.kind];
  if (!Kind) throw new Error(`there is no schema of ${each.apiVersion} ${each.kind}`);
  try {
    new Kind(each).validate();
  } catch (error) {
    throw new Error(`${each.kind} ${each.metadata.name}: ${error.message}`);
  }
  number += 1;
}
console.log(number);
