{{- define "tramontane.name" -}}
{{- printf "%s" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "tramontane.labels" -}}
app.kubernetes.io/name: tramontane
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "tramontane.selector" -}}
app.kubernetes.io/name: tramontane
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* All pools of workers as JSON, `worker` first: each has all settings, and its component, which ends the names of its objects. */}}
{{- define "tramontane.pools" -}}
{{- $pools := list (set (deepCopy .Values.worker) "component" "worker") -}}
{{- $components := list -}}
{{- range .Values.workerPools -}}
{{- $component := printf "worker-%s" .name -}}
{{- if has $component $components -}}
{{- fail (printf "workerPools: expected a name of its own for every pool, got %q twice" .name) -}}
{{- end -}}
{{- $components = append $components $component -}}
{{- /* Kubernetes makes a label of it, with a hyphen and a hash of ten characters; a label has 63 at most. */}}
{{- $whole := printf "%s-%s" (include "tramontane.name" $) $component -}}
{{- if gt (len $whole) 52 -}}
{{- fail (printf "workerPools: expected a StatefulSet's name of at most 52 characters, got %s with %d: the pool's name or the release's must be shorter" $whole (len $whole)) -}}
{{- end -}}
{{- $pool := deepCopy $.Values.worker -}}
{{- range $key, $value := . -}}
{{- $_ := set $pool $key $value -}}
{{- end -}}
{{- $pools = append $pools (set $pool "component" $component) -}}
{{- end -}}
{{- toJson $pools -}}
{{- end -}}

{{/* How many workers all pools have. */}}
{{- define "tramontane.workers" -}}
{{- $workers := 0 -}}
{{- range include "tramontane.pools" . | fromJsonArray -}}
{{- $workers = add $workers .replicas -}}
{{- end -}}
{{- $workers -}}
{{- end -}}

{{/* How many of them are to have experts: the first placement waits for those. */}}
{{- define "tramontane.expertWorkers" -}}
{{- $workers := 0 -}}
{{- range include "tramontane.pools" . | fromJsonArray -}}
{{- if contains "experts" .roles -}}
{{- $workers = add $workers .replicas -}}
{{- end -}}
{{- end -}}
{{- max 1 $workers -}}
{{- end -}}

{{/* The pods of all pools. The selector of the first one's objects, which cannot be changed, must not find the others. */}}
{{- define "tramontane.workerSelector" -}}
{{- if .Values.workerPools -}}
{{- $components := list -}}
{{- range include "tramontane.pools" . | fromJsonArray -}}
{{- $components = append $components .component -}}
{{- end -}}
matchLabels:
  app.kubernetes.io/name: tramontane
  app.kubernetes.io/instance: {{ .Release.Name }}
matchExpressions:
  - { key: app.kubernetes.io/component, operator: In, values: [{{ join ", " $components }}] }
{{- else -}}
matchLabels: {{- include "tramontane.selector" (dict "root" . "component" "worker") | nindent 2 }}
{{- end -}}
{{- end -}}

{{- define "tramontane.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "tramontane.etcdScheme" -}}
{{ if .Values.tls.insecure }}http{{ else }}https{{ end }}
{{- end -}}

{{/* What probes speak. */}}
{{- define "tramontane.scheme" -}}
{{ if .Values.tls.insecure }}HTTP{{ else }}HTTPS{{ end }}
{{- end -}}

{{/* The secret of a holder's certificate: clients, router, worker or etcd. */}}
{{- define "tramontane.secret" -}}
{{- index .root.Values.tls.existing .holder | default (printf "%s-%s-tls" (include "tramontane.name" .root) .holder) -}}
{{- end -}}

{{/* Names by which the holder's ports are reached, one a line. */}}
{{- define "tramontane.hosts" -}}
{{- $name := include "tramontane.name" .root -}}
{{- $services := list (index (dict "clients" $name "router" (printf "%s-admin" $name) "worker" (printf "%s-worker" $name) "etcd" (printf "%s-etcd" $name)) .holder) -}}
{{- if eq .holder "worker" -}}
{{- range .root.Values.workerPools -}}
{{- $services = append $services (printf "%s-worker-%s" $name .name) -}}
{{- end -}}
{{- end -}}
{{- $ns := .root.Release.Namespace -}}
localhost
{{- range $service := $services }}
{{ $service }}
{{ $service }}.{{ $ns }}
{{ $service }}.{{ $ns }}.svc
{{- if has $.holder (list "worker" "etcd") }}
*.{{ $service }}
*.{{ $service }}.{{ $ns }}.svc
{{- end }}
{{- end }}
{{- if eq .holder "clients" }}
{{- range .root.Values.tls.hosts }}
{{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Where a process of a role has its identity. */}}
{{- define "tramontane.tlsEnv" -}}
{{- if .root.Values.tls.insecure }}
- { name: TRAMONTANE_TLS__INSECURE, value: "true" }
{{- else }}
- { name: TRAMONTANE_TLS__CLUSTER_CERT, value: /tls/cluster/tls.crt }
- { name: TRAMONTANE_TLS__CLUSTER_KEY, value: /tls/cluster/tls.key }
- { name: TRAMONTANE_TLS__CLUSTER_CA, value: /tls/cluster/ca.crt }
{{- if eq .role "router" }}
- { name: TRAMONTANE_TLS__CLIENTS_CERT, value: /tls/clients/tls.crt }
- { name: TRAMONTANE_TLS__CLIENTS_KEY, value: /tls/clients/tls.key }
{{- end }}
{{- end }}
{{- with .root.Values.etcd.authSecret }}
- { name: TRAMONTANE_ETCD__USER, valueFrom: { secretKeyRef: { name: {{ . }}, key: username } } }
- { name: TRAMONTANE_ETCD__PASSWORD, valueFrom: { secretKeyRef: { name: {{ . }}, key: password } } }
{{- end }}
{{- if .root.Values.etcd.endpoints }}
{{- if .root.Values.etcd.tlsSecret }}
- { name: TRAMONTANE_ETCD__TLS_CA, value: /tls/etcd/ca.crt }
{{- if .root.Values.etcd.clientCert }}
- { name: TRAMONTANE_ETCD__TLS_CERT, value: /tls/etcd/tls.crt }
- { name: TRAMONTANE_ETCD__TLS_KEY, value: /tls/etcd/tls.key }
{{- end }}
{{- end }}
{{- else if not .root.Values.tls.insecure }}
- { name: TRAMONTANE_ETCD__TLS_CA, value: /tls/cluster/ca.crt }
- { name: TRAMONTANE_ETCD__TLS_CERT, value: /tls/cluster/tls.crt }
- { name: TRAMONTANE_ETCD__TLS_KEY, value: /tls/cluster/tls.key }
{{- end }}
{{- end -}}

{{- define "tramontane.tlsMounts" -}}
{{- if not .root.Values.tls.insecure }}
- { name: tls-cluster, mountPath: /tls/cluster, readOnly: true }
{{- if eq .role "router" }}
- { name: tls-clients, mountPath: /tls/clients, readOnly: true }
{{- end }}
{{- end }}
{{- if and .root.Values.etcd.endpoints .root.Values.etcd.tlsSecret }}
- { name: tls-etcd, mountPath: /tls/etcd, readOnly: true }
{{- end }}
{{- end -}}

{{- define "tramontane.tlsVolumes" -}}
{{- if not .root.Values.tls.insecure }}
- name: tls-cluster
  secret: { secretName: {{ include "tramontane.secret" (dict "root" .root "holder" .role) }}, defaultMode: 0440 }
{{- if eq .role "router" }}
- name: tls-clients
  secret: { secretName: {{ include "tramontane.secret" (dict "root" .root "holder" "clients") }}, defaultMode: 0440 }
{{- end }}
{{- end }}
{{- if and .root.Values.etcd.endpoints .root.Values.etcd.tlsSecret }}
- name: tls-etcd
  secret: { secretName: {{ .root.Values.etcd.tlsSecret }}, defaultMode: 0440 }
{{- end }}
{{- end -}}

{{/* Routers would not start: better to hear it before anything is installed. */}}
{{- define "tramontane.checkAuth" -}}
{{- $said := or .Values.auth.keysSecret .Values.auth.anonymous .Values.tls.insecure -}}
{{- range .Values.router.env -}}
{{- if hasPrefix "TRAMONTANE_AUTH__" .name -}}
{{- $said = true -}}
{{- end -}}
{{- end -}}
{{- if not $said -}}
{{- fail "auth: who may ask is not said: expected auth.keysSecret (kubectl create secret generic NAME --from-file=keys, of the file that `tramontane keys add` makes), TRAMONTANE_AUTH__JWT__... in router.env, or auth.anonymous=true to serve whoever reaches a router" -}}
{{- end -}}
{{- if and .Values.auth.keysSecret .Values.auth.anonymous -}}
{{- fail "auth: expected auth.keysSecret or auth.anonymous, got both" -}}
{{- end -}}
{{- end -}}

{{- define "tramontane.etcdEndpoints" -}}
{{- if .Values.etcd.endpoints -}}
{{ join "," .Values.etcd.endpoints }}
{{- else -}}
{{- $name := include "tramontane.name" . -}}
{{- $endpoints := list -}}
{{- range $i := until (int .Values.etcd.replicas) -}}
{{- $endpoints = append $endpoints (printf "%s://%s-etcd-%d.%s-etcd:2379" (include "tramontane.etcdScheme" $) $name $i $name) -}}
{{- end -}}
{{ join "," $endpoints }}
{{- end -}}
{{- end -}}

{{- define "tramontane.cluster" -}}
{{ .Values.cluster | default .Release.Name }}
{{- end -}}

{{- define "tramontane.modelArgs" -}}
{{- if .Values.model.existingClaim }}
- --model={{ printf "/models/%s" .Values.model.path }}
{{- end }}
{{- if .Values.model.name }}
- --model-name={{ .Values.model.name }}
{{- end }}
{{- end -}}

{{- define "tramontane.modelMount" -}}
{{- if .Values.model.existingClaim }}
- name: models
  mountPath: /models
  readOnly: true
{{- end }}
{{- end -}}

{{- define "tramontane.modelVolume" -}}
{{- if .Values.model.existingClaim }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.model.existingClaim }}
    readOnly: true
{{- end }}
{{- end -}}

{{- define "tramontane.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65534
runAsGroup: 65534
fsGroup: 65534
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "tramontane.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
